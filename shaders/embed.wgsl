// embed: X[r, t] = scale * E[id] [+ positions[p], where p is t, or the row's place in its sequence].
//
//   E lies as the matmul wants it, [d, V], so that tied weights are stored once
{% if F16 %}
enable f16;
{% endif %}
struct Params {
    rows: u32, width: u32, vocab_stride: u32, vocab: u32,
    scale: f32, first_position: u32, n_positions: u32, row_len: u32,
}
@group(0) @binding(0) var<uniform> P: Params;
@group(0) @binding(1) var<storage, read> ids: array<u32>;                   // [R]
@group(0) @binding(2) var<storage, read> table: array<{{ W_TYPE }}>;        // [d, V]
@group(0) @binding(3) var<storage, read_write> x: array<{{ T }}>;           // [R, d]
{% if HAS_POSITIONS %}
@group(0) @binding(4) var<storage, read> positions: array<f32>;             // [P, d]
{% if HAS_LENGTHS %}
@group(0) @binding(5) var<storage, read> lengths: array<u32>;               // [R], this token included
{% endif %}
{% endif %}

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
    var value = f32(table[c * P.vocab_stride + id]) * P.scale;
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
