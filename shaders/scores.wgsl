// scores: W[b, h, i, j] = log2 e * score(Q[b, h, i] . K[b, h / group, j]), the first of the three passes.
//
//   each thread: one query row, four keys
//     for d in 0 .. D by 4: acc[0..4] += dot(q[d..d+4], k[0..4][d..d+4])
//   keys that the row does not see are left NEVER; on request the score of a stage goes to the caller
{% if F16 %}
enable f16;
{% endif %}
{% from "shared/rows.wgsl" import element, row_loader %}
{% set stage = [["stage", "read_write", "f32"]] if STAGE != "softmax" else [] %}
{% set buffers = [["q", "read", element(Q_TYPE, VEC)], ["k", "read", element(K_TYPE, VEC)], ["weights", "read_write", "f32"]] + stage %}
{% include "shared/problem.wgsl" %}
{% include "shared/score.wgsl" %}
{{ row_loader("q", Q_TYPE, "head_dim", "x", VEC) }}
{{ row_loader("k", K_TYPE, "head_dim", "y", VEC) }}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let quads = (P.k_len + 3u) / 4u;
    let index = (P.block_from + workgroup_index(group, groups)) * 64u + thread;
    if (index >= P.count) { return; }
    let row = row_at(index / quads);
    if (row.x >= P.batch) { return; }
    let j = (index % quads) * 4u;
    let b = row.x;
    let h = row.y;
    let i = row.z;
    let kb = kv_row(b);
    let kh = h / (P.heads / P.kv_heads);
    let length = kv_length(kb);
    let position = q_position(b, length) + i32(i);
    let keys = keys_of(b, position, length);
    let q_row = query_at(P.q_at, b, h, i);
{% if STAGE in ["raw", "softcap"] %}
    let end = length;
{% else %}
    let end = last_key(keys);
{% endif %}

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
    let cell = P.weights_from + row_number(b, h, i) * P.k_len + j;
{% for n in range(4) %}
    if (j + {{ n }}u < P.k_len) {
        let x = score(s[{{ n }}], keys, b, h, i, j + {{ n }}u, position);
        weights[cell + {{ n }}u] = x;
{% if STAGE == "raw" %}
        stage[cell + {{ n }}u] = select(P.minus_infinity, s[{{ n }}] * P.scale, j + {{ n }}u < end);
{% elif STAGE == "softcap" %}
        stage[cell + {{ n }}u] = select(P.minus_infinity, softcapped(s[{{ n }}] * P.scale), j + {{ n }}u < end);
{% elif STAGE == "biased" %}
        stage[cell + {{ n }}u] = select(x * LN_2, P.minus_infinity, x <= NEVER);
{% endif %}
    }
{% endfor %}
}
