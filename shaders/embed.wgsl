// embed: X[r, t] = scale * E[id] [+ positions[p], where p is t, or the row's place in its sequence].
//
//   E lies as the matmul wants it, [d, V], so that tied weights are stored once
//   a table in blocks (shared/blocks.wgsl) is expanded where it is read
{% set BLOCKS = W_TYPE in ["q8_0", "q4_0", "q4_1"] %}
{% if F16 %}
enable f16;
{% endif %}
struct Params {
    rows: u32, width: u32, vocab_stride: u32, vocab: u32,
    scale: f32, first_position: u32, n_positions: u32, row_len: u32,
}
@group(0) @binding(0) var<uniform> P: Params;
@group(0) @binding(1) var<storage, read> ids: array<u32>;                   // [R]
@group(0) @binding(2) var<storage, read> table: array<{{ "u32" if BLOCKS else W_TYPE }}>;        // [d, V]
@group(0) @binding(3) var<storage, read_write> x: array<{{ T }}>;           // [R, d]
// positions [P, d]; lengths [R], this token included
{% set optional = (["positions: array<f32>"] if HAS_POSITIONS else [])
    + (["lengths: array<u32>"] if HAS_POSITIONS and HAS_LENGTHS else [])
    + (["scales: array<u32>"] if BLOCKS else []) %}
{% for declaration in optional %}
@group(0) @binding({{ 3 + loop.index }}) var<storage, read> {{ declaration }};
{% endfor %}

// Element `c` of a token's row.
fn element(c: u32, id: u32) -> f32 {
    let at = {{ "c" if not BLOCKS else "c / 4u" if W_TYPE == "q8_0" else "c / 8u" }} * P.vocab_stride + id;
{% if not BLOCKS %}
    return f32(table[at]);
{% else %}
    let block = (c / 32u) * P.vocab_stride + id;
{% if W_TYPE == "q4_1" %}
    let scale = unpack2x16float(scales[block]);
    return scale.x * f32((table[at] >> (4u * (c % 8u))) & 15u) + scale.y;
{% else %}
    let pair = unpack2x16float(scales[block / 2u]);
    let bits = {{ "24u - 8u * (c % 4u)" if W_TYPE == "q8_0" else "28u - 4u * (c % 8u)" }};
    let q = bitcast<i32>(table[at] << bits) >> {{ "24u" if W_TYPE == "q8_0" else "28u" }};
    return select(pair.x, pair.y, block % 2u == 1u) * f32(q);
{% endif %}
{% endif %}
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let index = (group.y * groups.x + group.x) * 64u + thread;
    if (index >= P.rows * P.width) { return; }
    let row = index / P.width;
    let c = index % P.width;
    let id = min(ids[row], P.vocab - 1u);
    var value = element(c, id) * P.scale;
{% if HAS_POSITIONS %}
{% if HAS_LENGTHS %}
    let place = lengths[row] - 1u;
{% else %}
    let place = row % P.row_len;
{% endif %}
    let position = min(place + P.first_position, P.n_positions - 1u);
    value += positions[position * P.width + c];
{% endif %}
    x[index] = {{ T }}(value);
}
