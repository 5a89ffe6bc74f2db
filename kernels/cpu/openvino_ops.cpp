// OpenVINO operations around the kernels: they know tensors and nothing else. What a call is like (its sizes,
// tables, types) stands in a structure that the engine keeps, whose address is the attribute `call`; the kernel is
// a function of a library that the engine has loaded, whose address is the attribute `function`.
// Tied to the OpenVINO it is compiled against; serving/engines/openvino_ops.py does the same with any.
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/op.hpp>
#include <openvino/runtime/tensor.hpp>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "hstu_attention/call.h"
#include "item_head/call.h"
#include "projection/call.h"

namespace {

using AttentionFunction = const char* (*)(const hstu::Call*);
using ProjectionFunction = const char* (*)(const hstu::ProjectionCall*);
using HeadFunction = void (*)(const hstu::HeadCall*);

const ov::element::Type kTypes[] = {ov::element::f32, ov::element::bf16, ov::element::i8};  // by hstu::Type

int64_t float_type(const ov::Tensor& tensor) {
    const auto type = tensor.get_element_type();
    OPENVINO_ASSERT(type == ov::element::f32 || type == ov::element::bf16, "a kernel is given ", type);
    return type == ov::element::f32 ? hstu::kFloat32 : hstu::kBfloat16;
}

const char* at(const ov::Tensor& tensor, int64_t column) {
    return static_cast<const char*>(tensor.data()) + column * static_cast<int64_t>(tensor.get_element_type().size());
}

// Columns of a contiguous [batch, rows, width], from `column` on.
hstu::Rows rows_of(const ov::Tensor& tensor, int64_t column) {
    const auto& shape = tensor.get_shape();
    const auto width = static_cast<int64_t>(shape[2]), rows = static_cast<int64_t>(shape[1]);
    return {at(tensor, column), width, rows * width, nullptr};
}

std::vector<int64_t> integers(const ov::Tensor& tensor) {
    std::vector<int64_t> values(tensor.get_size());
    if (tensor.get_element_type() == ov::element::i64) {
        std::copy_n(tensor.data<const int64_t>(), values.size(), values.begin());
    } else {
        std::copy_n(tensor.data<const int32_t>(), values.size(), values.begin());
    }
    return values;
}

// Inputs as the function's (see the domain `hstu`), without the bias tables; buckets are uint8. A jagged call has one
// more: where the rows of each user's history, [1, rows of all users, columns], start.
class Attention : public ov::op::Op {
public:
    OPENVINO_OP("HSTUKernelAttention", "hstu");
    Attention() = default;

    void validate_and_infer_types() override {
        const auto& rows = get_input_partial_shape(rows_input());
        const auto columns = call().heads * call().v_dim;
        const auto output = kTypes[call().out_type];
        set_output_size(output == ov::element::i8 ? 2 : 1);
        set_output_type(0, output, {rows[0], rows[1], columns});
        if (output == ov::element::i8) set_output_type(1, ov::element::f32, {rows[0], rows[1], 1});
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        auto clone = std::make_shared<Attention>();
        clone->m_call = m_call, clone->m_function = m_function, clone->m_layer = m_layer;
        clone->m_v_offset = m_v_offset, clone->m_k_offset = m_k_offset, clone->m_jagged = m_jagged;
        clone->set_arguments(inputs);
        clone->constructor_validate_and_infer_types();
        return clone;
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("call", m_call);
        visitor.on_attribute("function", m_function);
        visitor.on_attribute("v_offset", m_v_offset);
        visitor.on_attribute("k_offset", m_k_offset);
        visitor.on_attribute("layer", m_layer);
        visitor.on_attribute("jagged", m_jagged);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        hstu::Call c = call();
        const ov::Tensor& rows = inputs[rows_input()];
        const auto shape = rows.get_shape();
        const int64_t hv = c.heads * c.v_dim, hqk = c.heads * c.qk_dim;
        c.batch = static_cast<int64_t>(shape[0]), c.queries = static_cast<int64_t>(shape[1]), c.in_type = float_type(rows);
        outputs[0].set_shape({shape[0], shape[1], static_cast<size_t>(hv)});
        c.out = outputs[0].data();
        if (outputs.size() > 1) {
            outputs[1].set_shape({shape[0], shape[1], 1});
            c.out_scales = outputs[1].data<float>();
        }
        std::vector<int64_t> positions, seen, before, starts;
        const size_t last = inputs.size() - (m_jagged ? 2 : 1);
        if (m_jagged) starts = integers(inputs.back());
        if (c.mode == hstu::kQueries) {
            c.u = rows_of(rows, 0), c.q = rows_of(rows, hv);
            const bool cached = last == 5;  // of a history that is extended
            set_buckets(c, inputs[cached ? 3 : 2]);
            positions = integers(inputs[last]);
            for (int64_t b = 0; b < c.batch; ++b) {
                const auto first = positions.begin() + b * c.queries;
                seen.push_back(c.queries ? *std::max_element(first, first + c.queries) + 1 : 0);
            }
            if (cached) {
                c.k = rows_of(inputs[1], 0), c.v = rows_of(inputs[1], hqk);
                set_cache(c, inputs[2]);
                before = integers(inputs[4]);
                for (size_t i = 0; i < positions.size(); ++i)
                    if (positions[i] >= 0) positions[i] += before[i / static_cast<size_t>(c.queries)];
                c.prefix_lengths = before.data(), c.own_lengths = seen.data();
            } else {
                set_prefix(c, inputs[1], 0, hqk);
                c.prefix_lengths = seen.data();
            }
            c.positions = positions.data(), c.position_row_stride = 1, c.position_batch_stride = c.queries;
        } else {
            c.u = rows_of(rows, 0), c.v = rows_of(rows, hv), c.q = rows_of(rows, 2 * hv), c.k = rows_of(rows, 2 * hv + hqk);
            const bool causal = c.mode == hstu::kCausal, cached = last == 4;  // of a history that is extended
            set_buckets(c, inputs[causal && !cached ? 1 : 2]);
            positions = integers(inputs[last]);
            if (causal) {
                c.lengths = positions.data();
                if (m_jagged) {
                    c.batch = static_cast<int64_t>(positions.size());
                    c.queries = positions.empty() ? 0 : *std::max_element(positions.begin(), positions.end());
                }
                if (cached) {
                    set_cache(c, inputs[1]);
                    seen = integers(inputs[3]);
                    c.prefix_lengths = seen.data();
                }
            } else {
                set_prefix(c, inputs[0], m_k_offset, m_v_offset);
                c.positions = c.prefix_lengths = positions.data(), c.position_batch_stride = 1;
            }
        }
        if (m_jagged) set_starts(c, inputs[c.mode == hstu::kQueries ? 1 : 0], starts);  // the history, or what is new of it
        const char* error = reinterpret_cast<AttentionFunction>(m_function)(&c);
        OPENVINO_ASSERT(error == nullptr, "the attention kernel refuses the call: ", error ? error : "");
        return true;
    }

private:
    int64_t m_call = 0, m_function = 0, m_v_offset = 0, m_k_offset = 0, m_layer = 0, m_jagged = 0;

    const hstu::Call& call() const { return *reinterpret_cast<const hstu::Call*>(m_call); }
    size_t rows_input() const { return call().mode == hstu::kCandidates ? 1 : 0; }

    static void set_prefix(hstu::Call& c, const ov::Tensor& tensor, int64_t k_column, int64_t v_column) {
        c.prefix_rows = static_cast<int64_t>(tensor.get_shape()[1]), c.prefix_type = float_type(tensor);
        c.prefix_k = rows_of(tensor, k_column), c.prefix_v = rows_of(tensor, v_column);
    }

    // The rows of the history, which are the query rows themselves in mode kCausal and the prefix in the others, if it
    // is not a cache.
    static void set_starts(hstu::Call& c, const ov::Tensor& history, const std::vector<int64_t>& starts) {
        OPENVINO_ASSERT(static_cast<int64_t>(starts.size()) == c.batch + 1 && history.get_shape()[0] == 1 &&
                            starts.back() <= static_cast<int64_t>(history.get_shape()[1]),
                        "starts that do not fit their rows");
        if (c.mode == hstu::kCausal) c.u.starts = c.q.starts = starts.data();
        if (c.mode == hstu::kCausal || c.own_lengths) {
            c.v.starts = c.k.starts = starts.data();
        } else {
            c.prefix_k.starts = c.prefix_v.starts = starts.data();
        }
    }

    // This layer's rows of a cache [batch, layers, rows, k and v], where they lie.
    void set_cache(hstu::Call& c, const ov::Tensor& tensor) const {
        const auto& shape = tensor.get_shape();
        const auto rows = static_cast<int64_t>(shape[2]), width = static_cast<int64_t>(shape[3]);
        const int64_t first = m_layer * rows * width, user = static_cast<int64_t>(shape[1]) * rows * width;
        c.prefix_rows = c.own_bucket_column = rows, c.prefix_type = float_type(tensor), c.prefix_activated = 1;
        c.prefix_k = {at(tensor, first), width, user, nullptr};
        c.prefix_v = {at(tensor, first + c.heads * c.qk_dim), width, user, nullptr};
    }

    static void set_buckets(hstu::Call& c, const ov::Tensor& tensor) {
        const auto& shape = tensor.get_shape();
        c.buckets = tensor.data<const uint8_t>(), c.bucket_type = hstu::kUint8;
        c.bucket_row_stride = shape[1] > 1 ? static_cast<int64_t>(shape[2]) : 0;
        c.bucket_batch_stride = static_cast<int64_t>(shape[1] * shape[2]);
    }
};

// (user embeddings float32 [users, dim]) -> scores float32 and indices int32 [users, results]
class ItemHead : public ov::op::Op {
public:
    OPENVINO_OP("HSTUKernelItemHead", "hstu");
    ItemHead() = default;

    void validate_and_infer_types() override {
        const ov::PartialShape shape{get_input_partial_shape(0)[0], call().results};
        set_output_size(2);
        set_output_type(0, ov::element::f32, shape);
        set_output_type(1, ov::element::i32, shape);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        auto clone = std::make_shared<ItemHead>();
        clone->m_call = m_call, clone->m_function = m_function;
        clone->set_arguments(inputs);
        clone->constructor_validate_and_infer_types();
        return clone;
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("call", m_call);
        visitor.on_attribute("function", m_function);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        hstu::HeadCall c = call();
        const size_t users = inputs[0].get_shape()[0];
        for (auto& output : outputs) output.set_shape({users, static_cast<size_t>(c.results)});
        c.users = static_cast<int64_t>(users), c.embeddings = inputs[0].data<const float>();
        c.scores = outputs[0].data<float>(), c.indices = outputs[1].data<int32_t>();
        reinterpret_cast<HeadFunction>(m_function)(&c);
        return true;
    }

private:
    int64_t m_call = 0, m_function = 0;

    const hstu::HeadCall& call() const { return *reinterpret_cast<const hstu::HeadCall*>(m_call); }
};

// rows [.., depth] (int8: and their scales float32 [.., 1]), residual float32 [.., columns] if there is one
// -> [.., columns]
class Projection : public ov::op::Op {
public:
    OPENVINO_OP("HSTUKernelProjection", "hstu");
    Projection() = default;

    void validate_and_infer_types() override {
        ov::PartialShape shape = get_input_partial_shape(0);
        shape[shape.size() - 1] = call().columns;
        set_output_type(0, kTypes[call().out_type], shape);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        auto clone = std::make_shared<Projection>();
        clone->m_call = m_call, clone->m_function = m_function;
        clone->set_arguments(inputs);
        clone->constructor_validate_and_infer_types();
        return clone;
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("call", m_call);
        visitor.on_attribute("function", m_function);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        hstu::ProjectionCall c = call();
        ov::Shape shape = inputs[0].get_shape();
        shape.back() = static_cast<size_t>(c.columns);
        outputs[0].set_shape(shape);
        c.rows = static_cast<int64_t>(inputs[0].get_size()) / c.depth;
        const bool narrow = inputs[0].get_element_type() == ov::element::i8;
        c.in = inputs[0].data(), c.in_type = narrow ? hstu::kInt8 : float_type(inputs[0]);
        if (narrow) c.in_scales = inputs[1].data<const float>();
        if (inputs.size() > (narrow ? 2u : 1u)) c.residual = inputs.back().data<const float>();
        OPENVINO_ASSERT(!c.residual || inputs.back().get_size() == outputs[0].get_size(), "a residual of another shape");
        c.out = outputs[0].data(), c.out_type = float_type(outputs[0]);
        const char* error = reinterpret_cast<ProjectionFunction>(m_function)(&c);
        OPENVINO_ASSERT(error == nullptr, "the projection kernel refuses the call: ", error ? error : "");
        return true;
    }

private:
    int64_t m_call = 0, m_function = 0;

    const hstu::ProjectionCall& call() const { return *reinterpret_cast<const hstu::ProjectionCall*>(m_call); }
};

}  // namespace

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>(
    {std::make_shared<ov::OpExtension<Attention>>(), std::make_shared<ov::OpExtension<ItemHead>>(),
     std::make_shared<ov::OpExtension<Projection>>()}))
