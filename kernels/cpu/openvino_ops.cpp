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
#include <mutex>
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

// One attention call on tensors: its inputs are the function's (see the domain `hstu`), without the bias tables; buckets
// are uint8. A jagged call has one more: where the rows of each user's history, [1, rows of all users, columns], start.
struct AttentionOf {
    int64_t prepared = 0, function = 0, v_offset = 0, k_offset = 0, layer = 0, jagged = 0;

    const hstu::Call& call() const { return *reinterpret_cast<const hstu::Call*>(prepared); }
    size_t rows_input() const { return call().mode == hstu::kCandidates ? 1 : 0; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
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
        const size_t last = inputs.size() - (jagged ? 2 : 1);
        if (jagged) starts = integers(inputs.back());
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
                if (jagged) {
                    c.batch = static_cast<int64_t>(positions.size());
                    c.queries = positions.empty() ? 0 : *std::max_element(positions.begin(), positions.end());
                }
                if (cached) {
                    set_cache(c, inputs[1]);
                    seen = integers(inputs[3]);
                    c.prefix_lengths = seen.data();
                }
            } else {
                set_prefix(c, inputs[0], k_offset, v_offset);
                c.positions = c.prefix_lengths = positions.data(), c.position_batch_stride = 1;
            }
        }
        if (jagged) set_starts(c, inputs[c.mode == hstu::kQueries ? 1 : 0], starts);  // the history, or what is new of it
        const char* error = reinterpret_cast<AttentionFunction>(function)(&c);
        OPENVINO_ASSERT(error == nullptr, "the attention kernel refuses the call: ", error ? error : "");
        return true;
    }

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
        const int64_t first = layer * rows * width, user = static_cast<int64_t>(shape[1]) * rows * width;
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

class Attention : public ov::op::Op {
public:
    OPENVINO_OP("HSTUKernelAttention", "hstu");
    Attention() = default;

    void validate_and_infer_types() override {
        const auto& rows = get_input_partial_shape(m_of.rows_input());
        const auto columns = m_of.call().heads * m_of.call().v_dim;
        const auto output = kTypes[m_of.call().out_type];
        set_output_size(output == ov::element::i8 ? 2 : 1);
        set_output_type(0, output, {rows[0], rows[1], columns});
        if (output == ov::element::i8) set_output_type(1, ov::element::f32, {rows[0], rows[1], 1});
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        auto clone = std::make_shared<Attention>();
        clone->m_of = m_of;
        clone->set_arguments(inputs);
        clone->constructor_validate_and_infer_types();
        return clone;
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("call", m_of.prepared);
        visitor.on_attribute("function", m_of.function);
        visitor.on_attribute("v_offset", m_of.v_offset);
        visitor.on_attribute("k_offset", m_of.k_offset);
        visitor.on_attribute("layer", m_of.layer);
        visitor.on_attribute("jagged", m_of.jagged);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        return m_of.evaluate(outputs, inputs);
    }

private:
    AttentionOf m_of;
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

// One product on tensors: rows [.., depth] (int8: and their scales float32 [.., 1]), residual float32 [.., columns] if
// there is one -> [.., columns].
struct ProjectionOf {
    int64_t prepared = 0, function = 0;

    const hstu::ProjectionCall& call() const { return *reinterpret_cast<const hstu::ProjectionCall*>(prepared); }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
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
        const char* error = reinterpret_cast<ProjectionFunction>(function)(&c);
        OPENVINO_ASSERT(error == nullptr, "the projection kernel refuses the call: ", error ? error : "");
        return true;
    }
};

class Projection : public ov::op::Op {
public:
    OPENVINO_OP("HSTUKernelProjection", "hstu");
    Projection() = default;

    void validate_and_infer_types() override {
        ov::PartialShape shape = get_input_partial_shape(0);
        shape[shape.size() - 1] = m_of.call().columns;
        set_output_type(0, kTypes[m_of.call().out_type], shape);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        auto clone = std::make_shared<Projection>();
        clone->m_of = m_of;
        clone->set_arguments(inputs);
        clone->constructor_validate_and_infer_types();
        return clone;
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("call", m_of.prepared);
        visitor.on_attribute("function", m_of.function);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        return m_of.evaluate(outputs, inputs);
    }

private:
    ProjectionOf m_of;
};

// Memory for what stands between the products of a layer; kept, as fresh pages would cost more than some layers.
class Scratch {
public:
    explicit Scratch(size_t bytes) {
        {
            const std::lock_guard<std::mutex> guard(lock());
            if (!pool().empty()) {
                m_tensor = pool().back();
                pool().pop_back();
            }
        }
        if (!m_tensor || m_tensor.get_byte_size() < bytes) m_tensor = ov::Tensor(ov::element::u8, {bytes});
        m_next = static_cast<char*>(m_tensor.data());
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() {
        const std::lock_guard<std::mutex> guard(lock());
        pool().push_back(m_tensor);
    }

    static size_t size_of(const ov::element::Type& type, const ov::Shape& shape) {
        return (ov::shape_size(shape) * type.size() + 63) / 64 * 64;
    }
    ov::Tensor tensor(const ov::element::Type& type, const ov::Shape& shape) {
        ov::Tensor made(type, shape, m_next);
        m_next += size_of(type, shape);
        return made;
    }

private:
    ov::Tensor m_tensor;
    char* m_next;
    static std::mutex& lock() {
        static std::mutex it;
        return it;
    }
    static std::vector<ov::Tensor>& pool() {
        static std::vector<ov::Tensor> it;
        return it;
    }
};

// A layer as one operation: its projections, attention, and W_o. Inputs: what each projection reads, the residual, and
// those of attention after its rows -> the residual and what the layer adds to it.
class Layer : public ov::op::Op {
public:
    OPENVINO_OP("HSTUKernelLayer", "hstu");
    Layer() = default;

    void validate_and_infer_types() override {
        set_output_type(0, ov::element::f32, get_input_partial_shape(projections()));
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        auto clone = std::make_shared<Layer>();
        clone->m_first = m_first, clone->m_second = m_second, clone->m_last = m_last, clone->m_attention = m_attention;
        clone->set_arguments(inputs);
        clone->constructor_validate_and_infer_types();
        return clone;
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("first", m_first.prepared);
        visitor.on_attribute("second", m_second.prepared);
        visitor.on_attribute("last", m_last.prepared);
        visitor.on_attribute("project", m_last.function);
        visitor.on_attribute("call", m_attention.prepared);
        visitor.on_attribute("function", m_attention.function);
        visitor.on_attribute("jagged", m_attention.jagged);
        m_first.function = m_second.function = m_last.function;
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const size_t count = projections();
        const ProjectionOf* const projects[] = {&m_first, &m_second};
        const hstu::Call& call = m_attention.call();
        ov::Shape shapes[2], gated = inputs[0].get_shape(), scales = gated;
        size_t bytes = 0;
        for (size_t i = 0; i < count; ++i) {
            shapes[i] = inputs[i].get_shape();
            shapes[i].back() = static_cast<size_t>(projects[i]->call().columns);
            bytes += Scratch::size_of(kTypes[projects[i]->call().out_type], shapes[i]);
        }
        gated.back() = static_cast<size_t>(call.heads * call.v_dim), scales.back() = 1;
        const auto type = kTypes[call.out_type];
        Scratch scratch(bytes + Scratch::size_of(type, gated) + Scratch::size_of(ov::element::f32, scales));
        ov::TensorVector attended, rows;
        for (size_t i = 0; i < count; ++i) {
            ov::TensorVector made{scratch.tensor(kTypes[projects[i]->call().out_type], shapes[i])};
            projects[i]->evaluate(made, {inputs[i]});
            attended.push_back(made[0]);
        }
        attended.insert(attended.end(), inputs.begin() + static_cast<int64_t>(count) + 1, inputs.end());
        rows.push_back(scratch.tensor(type, gated));
        if (type == ov::element::i8) rows.push_back(scratch.tensor(ov::element::f32, scales));
        m_attention.evaluate(rows, attended);
        rows.push_back(inputs[count]);
        return m_last.evaluate(outputs, rows);
    }

private:
    ProjectionOf m_first, m_second, m_last;  // m_second: k and v, where u and q are of other rows
    AttentionOf m_attention;

    size_t projections() const { return m_second.prepared ? 2 : 1; }
};

}  // namespace

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>(
    {std::make_shared<ov::OpExtension<Attention>>(), std::make_shared<ov::OpExtension<ItemHead>>(),
     std::make_shared<ov::OpExtension<Projection>>(),
     std::make_shared<ov::OpExtension<Layer>>()}))
