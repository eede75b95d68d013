// scores: W[b, h, i, j] = scale * Q[b, h, i] . K[b, h / group, j], the first of the three passes.
//
//   each thread: one query row, four keys
//     for d in 0 .. D by 4: acc[0..4] += dot(q[d..d+4], k[0..4][d..d+4])
//   keys that the row does not see are left NEVER
{% if F16 %}
enable f16;
{% endif %}
{% set TQ = "vec4<" ~ Q_TYPE ~ ">" if VEC == 4 else Q_TYPE %}
{% set TK = "vec4<" ~ KV_TYPE ~ ">" if VEC == 4 else KV_TYPE %}
{% set buffers = [["q", "read", TQ], ["k", "read", TK], ["weights", "read_write", "f32"]] %}
{% include "shared/problem.wgsl" %}
{% include "shared/score.wgsl" %}
{% from "shared/rows.wgsl" import row_loader %}
{{ row_loader("q", "head_dim", VEC) }}
{{ row_loader("k", "head_dim", VEC) }}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let quads = (P.k_len + 3u) / 4u;
    let index = workgroup_index(group, groups) * 64u + thread;
    if (index >= P.batch * P.heads * P.q_len * quads) { return; }
    let row = index / quads;
    let j = (index % quads) * 4u;
    let i = row % P.q_len;
    let h = (row / P.q_len) % P.heads;
    let b = row / (P.q_len * P.heads);
    let kb = kv_row(b);
    let kh = h / (P.heads / P.kv_heads);
    let end = key_end(i, kv_length(kb));
    let q_row = P.q_at.x + b * P.q_at.y + h * P.q_at.z + i * P.q_at.w;

    // Rows past the end are read from the last key, so that every access is inside the tensor.
    var at = array<u32, 4>();
{% for n in range(4) %}
    at[{{ n }}] = key_at(P.k_at, kb, kh, min(j + {{ n }}u, max(end, 1u) - 1u));
{% endfor %}
    var s = vec4<f32>();
    if (j < end) {
        for (var d = 0u; d < P.head_dim; d += 4u) {
            let x = load_q(q_row, d);
            s += vec4<f32>(dot(x, load_k(at[0], d)), dot(x, load_k(at[1], d)), dot(x, load_k(at[2], d)), dot(x, load_k(at[3], d)));
        }
    }
{% for n in range(4) %}
    if (j + {{ n }}u < P.k_len) {
        weights[row * P.k_len + j + {{ n }}u] = select(NEVER, s[{{ n }}] * P.scale, j + {{ n }}u < end);
    }
{% endfor %}
}
