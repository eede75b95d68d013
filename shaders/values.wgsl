// values: O[b, h, i] = sum over j of W[b, h, i, j] * V[b, h / group, j], the last of the three passes.
//
//   each thread: one query row, four columns of V
{% if F16 %}
enable f16;
{% endif %}
{% set TV = "vec4<" ~ KV_TYPE ~ ">" if VEC == 4 else KV_TYPE %}
{% set TO = "vec4<" ~ O_TYPE ~ ">" if VEC == 4 else O_TYPE %}
{% set buffers = [["weights", "read", "f32"], ["v", "read", TV], ["o", "read_write", TO]] %}
{% include "shared/problem.wgsl" %}
{% include "shared/score.wgsl" %}
{% from "shared/rows.wgsl" import row_loader, row_writer %}
{{ row_loader("v", "value_dim", VEC) }}
{{ row_writer("o", O_TYPE, "value_dim", VEC) }}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let quads = (P.value_dim + 3u) / 4u;
    let index = workgroup_index(group, groups) * 64u + thread;
    if (index >= P.batch * P.heads * P.q_len * quads) { return; }
    let row = index / quads;
    let d = (index % quads) * 4u;
    let i = row % P.q_len;
    let h = (row / P.q_len) % P.heads;
    let b = row / (P.q_len * P.heads);
    let kb = kv_row(b);
    let kh = h / (P.heads / P.kv_heads);
    let end = key_end(i, kv_length(kb));

    var sum = vec4<f32>();
    for (var j = 0u; j < end; j += 1u) {
        sum += weights[row * P.k_len + j] * load_v(key_at(P.v_at, kb, kh, j), d);
    }
    store_o(P.o_at.x + b * P.o_at.y + h * P.o_at.z + i * P.o_at.w, d, sum);
}
