// merge: the parts of the key axis into one, in their order: O = sum 2^(m_s - m) O_s / sum 2^(m_s - m) l_s.
//
//   one thread: four columns of one row; a row that sees no key is zeros; a sink joins the denominator;
//   of a part without keys nothing but its l, 0, is there to read
{% if F16 %}
enable f16;
{% endif %}
{% from "shared/rows.wgsl" import out_element, row_writer %}
{% set lse = [["lse", "read_write", "f32"]] if HAS_LSE else [] %}
{% set buffers = [["parts", "read", "f32"], ["o", "read_write", out_element(O_TYPE, VEC)]] + lse %}
{% include "shared/problem.wgsl" %}
{% include "shared/score.wgsl" %}
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
    let stride = P.value_dim + 2u;
    let at = P.weights_from + part_number(row.x, row.y, row.z) * P.splits * stride;
    let sink = sink_of(row.y);
    var top = sink;
    for (var s = 0u; s < P.splits; s += 1u) { top = max(top, parts[at + s * stride + P.value_dim]); }
    var sum = vec4<f32>();
    var l = select(0.0, exp2(sink - top), sink > NEVER);
    for (var s = 0u; s < P.splits; s += 1u) {
        let part = at + s * stride;
        let l_part = parts[part + P.value_dim + 1u];
        if (l_part == 0.0) { continue; }
        let weight = exp2(parts[part + P.value_dim] - top);
        l = fma(weight, l_part, l);
        var x = vec4<f32>();
{% for e in range(4) %}
        if (d + {{ e }}u < P.value_dim) { x[{{ e }}] = parts[part + d + {{ e }}u]; }
{% endfor %}
        sum = fma(vec4<f32>(weight), x, sum);
    }
    store_o(query_at(P.o_at, row.x, row.y, row.z), d, sum * select(0.0, 1.0 / max(l, 1.0e-37), l > 0.0));
{% if HAS_LSE %}
    if (d == 0u) { lse[P.lse_from + row_number(row.x, row.y, row.z)] = lse_of(top, l); }
{% endif %}
}
