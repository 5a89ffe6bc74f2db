"""Time differences to bias buckets, exactly, by comparing integers.

Meta's formula is ⌊ln(max(1, |dt|)) / 0.301⌋ clamped to 0..128, in float32 (generative-recommenders,
`RelativeBucketedTimeAndPositionBasedBias`). A logarithm differs in its last bit from library to
library, so at a bucket's edge two runtimes would disagree. Here the edges are integers, found by
bisection over torch's own formula: every runtime that compares with them agrees with every other.
"""

from __future__ import annotations

import torch

# THRESHOLDS[k - 1] is the smallest dt whose bucket is k, for k = 1..128 (dt in the unit of the timestamps).
# fmt: off
THRESHOLDS: tuple[int, ...] = (
    2, 2, 3, 4, 5, 7, 9, 12, 16, 21, 28, 38, 51, 68, 92, 124, 167, 226, 305, 412, 557, 752, 1016, 1372, 1854, 2505,
    3385, 4574, 6180, 8350, 11283, 15245, 20600, 27834, 37610, 50818, 68666, 92782, 125367, 169397, 228891, 309280,
    417901, 564672, 762990, 1030959, 1393042, 1882290, 2543367, 3436623, 4643595, 6274467, 8478123, 11455710,
    15479070, 20915478, 28261151, 38186755, 51598331, 69720053, 94206437, 127292700, 171999177, 232406601, 314030161,
    424319920, 573345376, 774710112, 1046794145, 1414438848, 1911204161, 2582433664, 3489410432, 4714926848,
    6370844929, 8608349696, 11631690241, 15716857344, 21236737025, 28695292928, 38773372928, 52390873089, 70791081984,
    95653621760, 129247899648, 174641078272, 235976794113, 318853627905, 430838267905, 582153043969, 786609569792,
    1062874873856, 1436167241729, 1940563755009, 2622104403969, 3543014178817, 4787356827649, 6468712792065,
    8740590059521, 11810374156289, 15958267133952, 21562972438529, 29136107077633, 39368926429184, 53195692834816,
    71878563594241, 97122946908160, 131233266794497, 177324058214400, 239601604100097, 323751497433089,
    437457166270464, 591095444537345, 798692621680640, 1079203646668800, 1458228034535424, 1970368927498241,
    2662387547111425, 3597438166237184, 4860885340258305, 6568090280132608, 8874853327175681, 11991769344376832,
    16203431454703616, 21894198160523265, 29583718628720641, 39973748102660096, 54012827962179584,
)
# fmt: on


_MARGIN = 1e-3  # of a bucket's width: far above the error of any float32 logarithm, far below 1


def time_buckets(dt: torch.Tensor) -> torch.Tensor:
    """Bucket of each time difference: int64 of any shape in, int64 0..128 of the same shape out.

    A float32 logarithm, taken a little too low, guesses the bucket or the one below it (so 127 at most), and
    one comparison of integers tells which: the answer does not depend on whose logarithm it was, and the
    graph stays exportable with standard ONNX operators.
    """
    dt = dt.abs()
    next_bucket = torch.tensor(THRESHOLDS, dtype=torch.int64, device=dt.device)
    guess = (torch.log(dt.float().clamp(1.0, float(THRESHOLDS[-1]))) / 0.301 - _MARGIN).long()
    return guess + (dt >= next_bucket[guess]).long()
