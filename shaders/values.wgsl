// values: O[b, h, i] = sum over j of W[b, h, i, j] * V[b, h / group, j], the last of the three passes.
//
//   each thread: one query row, four columns of V
{% if F16 %}
enable f16;
{% endif %}
{% from "shared/rows.wgsl" import element, out_element, row_loader, row_writer %}
{% set buffers = [["weights", "read", "f32"], ["v", "read", element(V_TYPE, VEC)], ["o", "read_write", out_element(O_TYPE, VEC)]] %}
{% include "shared/problem.wgsl" %}
{% include "shared/score.wgsl" %}
{{ row_loader("v", V_TYPE, "value_dim", "z", VEC) }}
{{ row_writer("o", O_TYPE, "value_dim", VEC) }}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let quads = (P.value_dim + 3u) / 4u;
    let index = (P.block_from + workgroup_index(group, groups)) * 64u + thread;
    if (index >= P.count) { return; }
    let row = row_at(index / quads);
    if (row.x >= P.batch) { return; }
    let d = (index % quads) * 4u;
    let b = row.x;
    let h = row.y;
    let i = row.z;
    let kb = kv_row(b);
    let kh = h / (P.heads / P.kv_heads);
    let length = kv_length(kb);
    let keys = keys_of(b, q_position(b, length) + i32(i), length);
    let at = P.weights_from + row_number(b, h, i) * P.k_len;

    var sum = vec4<f32>();
    let last = last_key(keys);
    for (var j_from = first_key(keys); j_from < last; j_from += 4u) {
        // What lies at a masked key reaches nothing, NaN included.
{% for n in range(4) %}
        if (j_from + {{ n }}u < last) {
            let w = weights[at + j_from + {{ n }}u];
            if (!(w == 0.0)) { sum += w * load_v(key_at(P.v_at, kb, kh, j_from + {{ n }}u), d); }
        }
{% endfor %}
    }
    store_o(query_at(P.o_at, b, h, i), d, sum);
}
