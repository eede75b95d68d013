// prefill: O = softmax(scale * Q K^T) V for many query rows, with no [Q, K] matrix.
//
//   one workgroup: 32 query rows of one head, one block of at most 128 value columns, 8 threads a row
//   m, l, O = NEVER, 0, 0                    a thread: ROWS rows; O has ROWS rows x 4 columns a chunk
//   for each tile of 32 keys up to the last that a row of the block sees:
//     for each 32 columns of D: stage Q and K; S += Q K^T            a thread: ROWS rows x 4 keys
//     mask; m' = max(m, rowmax S); P = exp2(S - m'); l = l * a + P; O = O * a, a = exp2(m - m')
//     for each 32 columns of V: stage V; O += P V
//   O / l; a row that sees no key is zeros
//
// Tricks: operands lie in workgroup memory as vec4 along D, so that few loads feed many multiply-adds; the
// stride of 9 vec4 keeps rows on different banks; l stays a partial sum in each thread to the end.
// Value dims past 128 take more workgroups, each of which makes S anew: registers stay bounded. Four rows
// a thread feed 64 multiply-adds with 8 loads, two rows 32 with 6; but four rows of more than 32 value
// columns spill on Intel DG2 (SIMD8, 118 spills at 128 columns), so only the narrowest heads have four.
{% if F16 %}
enable f16;
{% endif %}
{% set TQ = "vec4<" ~ Q_TYPE ~ ">" if VEC == 4 else Q_TYPE %}
{% set TK = "vec4<" ~ KV_TYPE ~ ">" if VEC == 4 else KV_TYPE %}
{% set TO = "vec4<" ~ O_TYPE ~ ">" if VEC == 4 else O_TYPE %}
{% set buffers = [["q", "read", TQ], ["k", "read", TK], ["v", "read", TK], ["o", "read_write", TO]] %}
{% include "shared/problem.wgsl" %}
{% include "shared/score.wgsl" %}
{% from "shared/rows.wgsl" import row_loader, row_writer %}
{{ row_loader("q", "head_dim", VEC) }}
{{ row_loader("k", "head_dim", VEC) }}
{{ row_loader("v", "value_dim", VEC) }}
{{ row_writer("o", O_TYPE, "value_dim", VEC) }}

const ROWS = {{ ROWS }}u;       // rows of a thread
const THREADS = {{ 8 * (32 // ROWS) }}u;
const BLOCK_Q = 32u;
const BLOCK_K = 32u;
const STRIDE = 9u;   // vec4s between rows of a staged tile: 8 and one of padding
const V_BLOCK = {{ V_CHUNKS * 32 }}u;

var<workgroup> wg_q: array<vec4<f32>, 288>;   // 32 rows; then P
var<workgroup> wg_k: array<vec4<f32>, 288>;   // 32 keys; then V
var<workgroup> wg_max: array<f32, 256>;       // 32 rows x 8 threads

@compute @workgroup_size({{ 8 * (32 // ROWS) }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let q_blocks = (P.q_len + BLOCK_Q - 1u) / BLOCK_Q;
    let v_blocks = (P.value_dim + V_BLOCK - 1u) / V_BLOCK;
    let index = workgroup_index(group, groups);
    if (index >= P.batch * P.heads * q_blocks * v_blocks) { return; }
    let v_from = (index % v_blocks) * V_BLOCK;
    let q_from = (index / v_blocks % q_blocks) * BLOCK_Q;
    let h = index / (v_blocks * q_blocks) % P.heads;
    let b = index / (v_blocks * q_blocks * P.heads);
    let kb = kv_row(b);
    let kh = h / (P.heads / P.kv_heads);
    let length = kv_length(kb);
    let block_end = key_end(min(q_from + BLOCK_Q, P.q_len) - 1u, length);

    let tx = thread % 8u;   // keys tx, tx + 8, ..; columns 4 tx .. 4 tx + 3 of a chunk of V
    let ty = thread / 8u;   // rows ROWS ty .. ROWS ty + ROWS - 1
    let q_base = P.q_at.x + b * P.q_at.y + h * P.q_at.z;

{% for i in range(ROWS) %}
    let row_{{ i }} = q_from + ty * ROWS + {{ i }}u;
    let end_{{ i }} = select(0u, key_end(row_{{ i }}, length), row_{{ i }} < P.q_len);
    var m_{{ i }} = NEVER;
    var l_{{ i }} = 0.0;
{% for c in range(V_CHUNKS) %}
    var o_{{ i }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}

    for (var k_from = 0u; k_from < block_end; k_from += BLOCK_K) {
{% for i in range(ROWS) %}
        var s_{{ i }} = vec4<f32>();
{% endfor %}
        for (var d = 0u; d < P.head_dim; d += 32u) {
            for (var n = thread; n < 256u; n += THREADS) {
                let row = n / 8u;
                let column = n % 8u;
                let i = min(q_from + row, P.q_len - 1u);
                wg_q[row * STRIDE + column] = load_q(q_base + i * P.q_at.w, d + column * 4u);
                let j = min(k_from + row, block_end - 1u);
                wg_k[row * STRIDE + column] = load_k(key_at(P.k_at, kb, kh, j), d + column * 4u);
            }
            workgroupBarrier();
            for (var n = 0u; n < 8u; n += 1u) {
{% for i in range(ROWS) %}
                let q_{{ i }} = wg_q[(ty * ROWS + {{ i }}u) * STRIDE + n];
{% endfor %}
{% for j in range(4) %}
                let k_{{ j }} = wg_k[(tx + {{ j * 8 }}u) * STRIDE + n];
{% endfor %}
{% for i in range(ROWS) %}
                s_{{ i }} += vec4<f32>(dot(q_{{ i }}, k_0), dot(q_{{ i }}, k_1), dot(q_{{ i }}, k_2), dot(q_{{ i }}, k_3));
{% endfor %}
            }
            workgroupBarrier();
        }

        let keys = vec4<u32>(k_from + tx) + vec4<u32>(0u, 8u, 16u, 24u);
{% for i in range(ROWS) %}
        let seen_{{ i }} = keys < vec4<u32>(end_{{ i }});
        s_{{ i }} = select(vec4<f32>(NEVER), s_{{ i }} * (P.scale * LOG2_E), seen_{{ i }});
        wg_max[(ty * ROWS + {{ i }}u) * 8u + tx] = max(max(s_{{ i }}.x, s_{{ i }}.y), max(s_{{ i }}.z, s_{{ i }}.w));
{% endfor %}
        workgroupBarrier();
{% for i in range(ROWS) %}
        {
            var top = m_{{ i }};
            for (var n = 0u; n < 8u; n += 1u) { top = max(top, wg_max[(ty * ROWS + {{ i }}u) * 8u + n]); }
            let shrink = exp2(m_{{ i }} - top);
            let p = select(vec4<f32>(), exp2(s_{{ i }} - top), seen_{{ i }});
            m_{{ i }} = top;
            l_{{ i }} = l_{{ i }} * shrink + (p.x + p.y + p.z + p.w);
{% for c in range(V_CHUNKS) %}
            o_{{ i }}_{{ c }} *= shrink;
{% endfor %}
            // P lies in wg_q with key tx + 8 n at column tx, component n: V is staged in that order.
            wg_q[(ty * ROWS + {{ i }}u) * STRIDE + tx] = p;
        }
{% endfor %}

{% for c in range(V_CHUNKS) %}
        for (var n = thread; n < 256u; n += THREADS) {
            let row = n / 8u;
            let column = n % 8u;
            let j = k_from + row;
            var x = vec4<f32>();
            if (j < block_end) { x = load_v(key_at(P.v_at, kb, kh, j), v_from + {{ c * 32 }}u + column * 4u); }
            wg_k[row * STRIDE + column] = x;
        }
        workgroupBarrier();
        for (var n = 0u; n < 8u; n += 1u) {
{% for i in range(ROWS) %}
            let p_{{ i }} = wg_q[(ty * ROWS + {{ i }}u) * STRIDE + n];
{% endfor %}
{% for j in range(4) %}
            let v_{{ j }} = wg_k[(n + {{ j * 8 }}u) * STRIDE + tx];
{% endfor %}
{% for i in range(ROWS) %}
            o_{{ i }}_{{ c }} += p_{{ i }}.x * v_0 + p_{{ i }}.y * v_1 + p_{{ i }}.z * v_2 + p_{{ i }}.w * v_3;
{% endfor %}
        }
        workgroupBarrier();
{% endfor %}
    }

{% for i in range(ROWS) %}
    wg_max[(ty * ROWS + {{ i }}u) * 8u + tx] = l_{{ i }};
{% endfor %}
    workgroupBarrier();
{% for i in range(ROWS) %}
    if (row_{{ i }} < P.q_len) {
        var sum = 0.0;
        for (var n = 0u; n < 8u; n += 1u) { sum += wg_max[(ty * ROWS + {{ i }}u) * 8u + n]; }
        let over = select(0.0, 1.0 / max(sum, 1.0e-30), sum > 0.0);
        let at = P.o_at.x + b * P.o_at.y + h * P.o_at.z + row_{{ i }} * P.o_at.w;
{% for c in range(V_CHUNKS) %}
        store_o(at, v_from + {{ c * 32 }}u + tx * 4u, o_{{ i }}_{{ c }} * over);
{% endfor %}
    }
{% endfor %}
}
