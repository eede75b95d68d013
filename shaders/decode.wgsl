// decode: O = softmax(scale * Q K^T) V for a few query rows, one part of the key axis a workgroup.
//
//   rows: the G = H / Hk query heads of one KV head times the Q queries, ROWS of them a workgroup, so
//   that K and V are read once for all of them
//   m, l, O = NEVER, 0, 0
//   for each 64 keys of this part:
//     thread = key:            s[r] = scale * q[r] . k
//     all:                     m' = max(m, max s); P = exp2(s - m')
//     thread = (4 columns, slice of the keys):  O[r] = O[r] * a + sum over its keys of P[r] V
//   add the slices up; O / l, or (O, m, l) for `merge` where the key axis has several parts
//
// Tricks: two barriers for 64 keys, since scores and weights lie in arrays of their own; every thread
// finds the maximum for itself by broadcast reads, which costs less than a tree of barriers.
{% if F16 %}
enable f16;
{% endif %}
{% set TQ = "vec4<" ~ Q_TYPE ~ ">" if VEC == 4 else Q_TYPE %}
{% set TK = "vec4<" ~ KV_TYPE ~ ">" if VEC == 4 else KV_TYPE %}
{% set TO = "vec4<" ~ O_TYPE ~ ">" if VEC == 4 else O_TYPE %}
{% set result = [["parts", "read_write", "f32"]] if SPLIT else [["o", "read_write", TO]] %}
{% set buffers = [["q", "read", TQ], ["k", "read", TK], ["v", "read", TK]] + result %}
{% include "shared/problem.wgsl" %}
{% include "shared/score.wgsl" %}
{% from "shared/rows.wgsl" import row_loader, row_writer %}
{{ row_loader("q", "head_dim", VEC) }}
{{ row_loader("k", "head_dim", VEC) }}
{{ row_loader("v", "value_dim", VEC) }}
{% if not SPLIT %}
{{ row_writer("o", O_TYPE, "value_dim", VEC) }}
{% endif %}

const ROWS = {{ ROWS }}u;
const KEYS = 64u;               // keys a step, and threads
const QUADS = {{ QUADS }}u;     // vec4s in a row of Q
const COLUMNS = {{ COLUMNS }}u; // vec4 columns of V that are summed at once
const SLICES = {{ SLICES }}u;   // slices of the keys, COLUMNS threads each

var<workgroup> wg_q: array<vec4<f32>, {{ ROWS * QUADS }}>;
var<workgroup> wg_s: array<f32, {{ ROWS * 64 }}>;         // scores, 64 a row
var<workgroup> wg_p: array<f32, {{ ROWS * 64 }}>;         // weights, 64 a row
var<workgroup> wg_o: array<vec4<f32>, 64>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let per_head = P.heads / P.kv_heads;
    let rows_all = per_head * P.q_len;
    let blocks = (rows_all + ROWS - 1u) / ROWS;
    let index = workgroup_index(group, groups);
    if (index >= P.batch * P.kv_heads * blocks * P.splits) { return; }
    let split = index % P.splits;
    let first = (index / P.splits % blocks) * ROWS;
    let kh = index / (P.splits * blocks) % P.kv_heads;
    let b = index / (P.splits * blocks * P.kv_heads);
    let kb = kv_row(b);
    let length = kv_length(kb);
    let from_key = split * P.split_len;
    let to_key = min(from_key + P.split_len, length);

{% for r in range(ROWS) %}
    // Row {{ r }}: query i of head h; rows past the last repeat it and are not written.
    let row_{{ r }} = min(first + {{ r }}u, rows_all - 1u);
    let h_{{ r }} = kh * per_head + row_{{ r }} / P.q_len;
    let i_{{ r }} = row_{{ r }} % P.q_len;
    let end_{{ r }} = key_end(i_{{ r }}, length);
    let q_row_{{ r }} = P.q_at.x + b * P.q_at.y + h_{{ r }} * P.q_at.z + i_{{ r }} * P.q_at.w;
    for (var n = thread; n < QUADS; n += 64u) {
        wg_q[{{ r }}u * QUADS + n] = load_q(q_row_{{ r }}, n * 4u) * (P.scale * LOG2_E);
    }
    var m_{{ r }} = NEVER;
    var l_{{ r }} = 0.0;
{% for c in range(CHUNKS) %}
    var o_{{ r }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}
    workgroupBarrier();

    let column = thread % COLUMNS;
    let slice = thread / COLUMNS;

    for (var j_from = from_key; j_from < to_key; j_from += KEYS) {
        let j = j_from + thread;
{% for r in range(ROWS) %}
        var s_{{ r }} = 0.0;
{% endfor %}
        if (j < to_key) {
            let at = key_at(P.k_at, kb, kh, j);
            for (var n = 0u; n < QUADS; n += 1u) {
                let x = load_k(at, n * 4u);
{% for r in range(ROWS) %}
                s_{{ r }} += dot(wg_q[{{ r }}u * QUADS + n], x);
{% endfor %}
            }
        }
{% for r in range(ROWS) %}
        let seen_{{ r }} = j < min(to_key, end_{{ r }});
        s_{{ r }} = select(NEVER, s_{{ r }}, seen_{{ r }});
        wg_s[{{ r * 64 }}u + thread] = s_{{ r }};
{% endfor %}
        workgroupBarrier();
{% for r in range(ROWS) %}
        var new_{{ r }} = m_{{ r }};
        for (var n = 0u; n < KEYS; n += 1u) { new_{{ r }} = max(new_{{ r }}, wg_s[{{ r * 64 }}u + n]); }
        let shrink_{{ r }} = exp2(m_{{ r }} - new_{{ r }});
        m_{{ r }} = new_{{ r }};
        let p_{{ r }} = select(0.0, exp2(s_{{ r }} - new_{{ r }}), seen_{{ r }});
        l_{{ r }} = l_{{ r }} * shrink_{{ r }} + p_{{ r }};
        wg_p[{{ r * 64 }}u + thread] = p_{{ r }};
{% for c in range(CHUNKS) %}
        o_{{ r }}_{{ c }} *= shrink_{{ r }};
{% endfor %}
{% endfor %}
        workgroupBarrier();
        if (slice < SLICES) {
            let n_keys = min(KEYS, to_key - j_from);
            for (var n = slice; n < n_keys; n += SLICES) {
                let at = key_at(P.v_at, kb, kh, j_from + n);
{% for c in range(CHUNKS) %}
                let v_{{ c }} = load_v(at, (column + {{ c }}u * COLUMNS) * 4u);
{% endfor %}
{% for r in range(ROWS) %}
                let w_{{ r }} = wg_p[{{ r * 64 }}u + n];
{% for c in range(CHUNKS) %}
                o_{{ r }}_{{ c }} += w_{{ r }} * v_{{ c }};
{% endfor %}
{% endfor %}
            }
        }
    }

{% for r in range(ROWS) %}
    // Row {{ r }}: the sum of the threads' parts of l, then of the slices' parts of O.
    workgroupBarrier();
    wg_p[thread] = l_{{ r }};
    workgroupBarrier();
    l_{{ r }} = 0.0;
    for (var n = 0u; n < 64u; n += 1u) { l_{{ r }} += wg_p[n]; }
{% if SPLIT %}
    let out_{{ r }} = (((b * P.heads + h_{{ r }}) * P.q_len + i_{{ r }}) * P.splits + split) * (P.value_dim + 2u);
    if (thread == 0u && first + {{ r }}u < rows_all) {
        parts[out_{{ r }} + P.value_dim] = m_{{ r }};
        parts[out_{{ r }} + P.value_dim + 1u] = l_{{ r }};
    }
{% else %}
    let out_{{ r }} = P.o_at.x + b * P.o_at.y + h_{{ r }} * P.o_at.z + i_{{ r }} * P.o_at.w;
    let over_{{ r }} = select(0.0, 1.0 / max(l_{{ r }}, 1.0e-30), l_{{ r }} > 0.0);
{% endif %}
{% for c in range(CHUNKS) %}
    workgroupBarrier();
    wg_o[thread] = o_{{ r }}_{{ c }};
    workgroupBarrier();
    if (thread < COLUMNS && first + {{ r }}u < rows_all) {
        var sum = vec4<f32>();
        for (var n = 0u; n < SLICES; n += 1u) { sum += wg_o[n * COLUMNS + thread]; }
        let d = (thread + {{ c }}u * COLUMNS) * 4u;
{% if SPLIT %}
{% for e in range(4) %}
        if (d + {{ e }}u < P.value_dim) { parts[out_{{ r }} + d + {{ e }}u] = sum[{{ e }}]; }
{% endfor %}
{% else %}
        store_o(out_{{ r }}, d, sum * over_{{ r }});
{% endif %}
    }
{% endfor %}
{% endfor %}
}
