// The attention problem: sizes, strides and tensors. Before the include a kernel sets `buffers`, a list
// of [name, access, element type]; they are bound in that order behind the parameters, then come the
// optional `kv_len` and `rows`.

struct Problem {
    batch: u32, heads: u32, q_len: u32, head_dim: u32,
    kv_batch: u32, kv_heads: u32, k_len: u32, value_dim: u32,
    // A view's offset, then its strides over batch, head and row, in elements.
    q_at: vec4<u32>,     // [B, H, Q, D]
    k_at: vec4<u32>,     // [Bk, Hk, K, D]
    v_at: vec4<u32>,     // [Bk, Hk, K, Dv]
    o_at: vec4<u32>,     // [B, H, Q, Dv]
    scale: f32,          // of Q K^T
    splits: u32,         // parts of the key axis
    split_len: u32,      // keys in each part
    rows_stride: u32,    // of `rows`, over the batch
}

@group(0) @binding(0) var<uniform> P: Problem;
{% set optional = ([["kv_len", "read", "u32"]] if HAS_KV_LEN else []) + ([["rows", "read", "u32"]] if HAS_ROWS else []) %}
{% for name, access, element in buffers + optional %}
@group(0) @binding({{ loop.index }}) var<storage, {{ access }}> {{ name }}: array<{{ element }}>;
{% endfor %}

const LOG2_E = 1.4426950408889634;
// Stands for a score that is masked or not there yet: finite, so that no infinity enters the arithmetic.
const NEVER = -1.0e30;

// The number of this workgroup in a grid that is folded over two dimensions.
fn workgroup_index(id: vec3<u32>, count: vec3<u32>) -> u32 {
    return id.y * count.x + id.x;
}

// The batch row of K and V that query batch row `b` attends to: several may share one.
fn kv_row(b: u32) -> u32 {
    return b / (P.batch / P.kv_batch);
}

// Where key `j` of batch row `kb` lies: `rows` names the batch row that holds each position.
fn key_at(view: vec4<u32>, kb: u32, head: u32, j: u32) -> u32 {
{% if HAS_ROWS %}
    let row = min(rows[kb * P.rows_stride + j], P.kv_batch - 1u);
{% else %}
    let row = kb;
{% endif %}
    return view.x + row * view.y + head * view.z + j * view.w;
}
