// prefill: O = softmax(score(Q K^T)) V for many query rows, with no [Q, K] matrix.
//
//   one workgroup: 32 of the rows of one KV head, one block of at most 128 value columns, 8 threads a row;
//   the rows are the queries of the G = H / Hk heads of the group, one head after the other
//   m, l, O = NEVER, 0, 0                    a thread: ROWS rows; O has ROWS rows x 4 columns a chunk
//   for each tile of 32 keys that a row of the block may see:
//     for each 32 columns of D: stage Q and K; S += Q K^T            a thread: ROWS rows x 4 keys
//     score; if rowmax S > m + 8: m' = rowmax S; l, O = l * a, O * a, a = exp2(m - m')
//     P = exp2(S - m); l += P
//     for each 32 columns of V: stage V; O += P V
//   O / l; a row that sees no key is zeros
//
// Tricks: operands lie in workgroup memory as vec4 along D, so that few loads feed many multiply-adds; the
// stride of 9 vec4 keeps rows on different banks; l stays a partial sum in each thread to the end; O is
// rescaled only where the maximum grows by more than 8, each row for itself, so that no row's result
// depends on its neighbours. With subgroups the row's maximum comes by shuffles among its 8 lanes.
// Value dims past 128 take more workgroups, each of which makes S anew: registers stay bounded. Four rows
// a thread feed 64 multiply-adds with 8 loads, two rows 32 with 6; but four rows of more than 32 value
// columns spill on Intel DG2 (SIMD8, 118 spills at 128 columns), fewer with some options or in f16 do as well,
// so only the narrowest heads have four, and none where registers are few. Where a
// thread's part of a tile lies in Q, K and V is worked out once: the divisions by the queries of a head, in
// every tile, took half of DG2's cycles and a third of navi31's.
//
// F16_MATH: P and V are staged as f16 and multiplied in it, four keys at a time; their sums, and all else, stay
// in f32. Beside eager PyTorch in f16 errors are 0.45 times as large on average, 1.05 times at worst (root mean
// square of a problem); of 14,000 rows one is off by more than twice what PyTorch's same row is. Of the cycles
// that compilers estimate for f32's it takes 0.83 on navi21 and 0.92 on vega10, but 1.01 on navi31, which issues two
// f32 operations at once, and on DG2 1.06 (D 64) and 1.23 (D 128).
//
// Lost for F16_MATH, errors by a simulation with random operands: products of Q and K in f16, 8 of a lane (0.7 of f32's
// cycles on navi21, 0.77 on vega10, 1.13 on navi31, 1.23 on DG2), 0.5 to 1.5 times PyTorch's errors, but up to 5 % of the
// rows past twice its own, by a factor of 12 where scores reach 250; sums of two, which save nothing, still by 6
// there; eight keys of V at a time, up to 9 rows in 1,000; Q and K staged as f16 for f32 products, 1.2 to 1.5 times
// f32's cycles on vega10 and navi31.
//
// Lost: the products unrolled where registers are few, 42 spills on DG2 at 128 columns. On llvmpipe, where each lane's read of workgroup memory is one of its own, this kernel makes 4.4
// GFLOP/s at 8 heads of 512 x 512, D 64, and `prefill_lanes` 47, so plans take that one there.
{% if F16 %}
enable f16;
{% endif %}
{% if SUBGROUPS and BROWSER %}
enable subgroups;
{% endif %}
{% from "shared/rows.wgsl" import element, out_element, row_loader, row_writer %}
{% set lse = [["lse", "read_write", "f32"]] if HAS_LSE else [] %}
{% set map = [["block_map", "read", "u32"]] if HAS_BLOCK_MAP else [] %}
{% set buffers = [["q", "read", element(Q_TYPE, VEC)], ["k", "read", element(K_TYPE, VEC)], ["v", "read", element(V_TYPE, VEC)], ["o", "read_write", out_element(O_TYPE, VEC)]] + lse + map %}
{% from "shared/tile.wgsl" import tile_of %}
{% include "shared/problem.wgsl" %}
{% include "shared/score.wgsl" %}
{{ row_loader("q", Q_TYPE, "head_dim", "x", VEC) }}
{{ row_loader("k", K_TYPE, "head_dim", "y", VEC) }}
{{ row_loader("v", V_TYPE, "value_dim", "z", VEC) }}
{{ row_writer("o", O_TYPE, "value_dim", VEC) }}
{% set BY_ELEMENT = HAS_MASK or HAS_MASK_MOD %}
{# Where P and V are staged, and how their products come to O. #}
{% set WG_P = "wg_p" if F16_MATH else "wg_q" %}
{% set WG_V = "wg_v" if F16_MATH else "wg_k" %}
{% set M = "f16" if F16_MATH else "f32" %}
{% set EDGES = HAS_RIGHT or HAS_LEFT or HAS_PREFIX or HAS_BIAS or HAS_SCORE_MOD or BY_ELEMENT %}

{# Unrolled, the products keep more than the 128 registers of Intel's threads busy: 40 spills on DG2. #}
{% set TURNS = " * P.one" if FEW_REGISTERS else ROLL %}
const ROWS = {{ ROWS }}u;       // rows of a thread
const BLOCK_Q = 32u;
const BLOCK_K = 32u;
const STRIDE = 9u;   // vec4s between rows of a staged tile: 8 and one of padding
const V_BLOCK = {{ V_CHUNKS * 32 }}u;

var<workgroup> wg_q: array<vec4<f32>, 288>;   // 32 rows{{ "" if F16_MATH else "; then P" }}
var<workgroup> wg_k: array<vec4<f32>, 288>;   // 32 keys{{ "" if F16_MATH else "; then V" }}
{% if F16_MATH %}
var<workgroup> wg_p: array<vec4<f16>, 288>;
var<workgroup> wg_v: array<vec4<f16>, 288>;
{% endif %}
{% if not SUBGROUPS %}
var<workgroup> wg_row: array<f32, 256>;       // 32 rows x 8 threads
{% endif %}

{% macro over_row(op, out, row) %}
{# The maximum or sum over a row's 8 threads. #}
{% if SUBGROUPS %}
{% for step in [1, 2, 4] %}
        {{ out }} = {{ "max(" ~ out ~ ", " if op == "max" else "(" ~ out ~ " + " }}subgroupShuffleXor({{ out }}, {{ step }}u));
{% endfor %}
{% else %}
        for (var n = 0u; n < 8u{{ ROLL }}; n += 1u) { {{ out }} = {{ "max(" ~ out ~ ", " if op == "max" else "(" ~ out ~ " + " }}wg_row[{{ row }} * 8u + n]); }
{% endif %}
{% endmacro %}

@compute @workgroup_size({{ 8 * (32 // ROWS) }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
{% if SUBGROUPS %}
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) lanes: u32,
    @builtin(subgroup_invocation_id) lane: u32,
{% else %}
    @builtin(local_invocation_index) thread: u32,
{% endif %}
) {
{% if SUBGROUPS %}
    let thread = subgroup * lanes + lane;
{% endif %}
    let v_blocks = (P.value_dim + V_BLOCK - 1u) / V_BLOCK;
    let index = P.block_from + workgroup_index(group, groups);
    if (index >= P.count) { return; }
    let v_from = (index % v_blocks) * V_BLOCK;
    let per_kv = P.heads / P.kv_heads;
    let block = block_at(index / v_blocks % P.blocks, BLOCK_Q, per_kv);
    if (block.x >= P.batch) { return; }
{{ tile_of("BLOCK_Q") }}
    let tx = thread % 8u;   // keys tx, tx + 8, ..; columns 4 tx .. 4 tx + 3 of a chunk of V
    let ty = thread / 8u;   // rows ROWS ty .. ROWS ty + ROWS - 1

{% for i in range(ROWS) %}
    let row_{{ i }} = row_from + ty * ROWS + {{ i }}u;
    let h_{{ i }} = kh * per_kv + min(row_{{ i }}, rows - 1u) / queries;
    let i_{{ i }} = min(row_{{ i }}, rows - 1u) % queries;
    let position_{{ i }} = start + i32(i_{{ i }});
    let keys_{{ i }} = keys_of(b, position_{{ i }}, length);
    var m_{{ i }} = NEVER;
    var l_{{ i }} = 0.0;
{% for c in range(V_CHUNKS) %}
    var o_{{ i }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}

    // A thread stages column tx of ROWS rows of each tile.
    let place = ty * STRIDE + tx;
{% for i in range(ROWS) %}
    let from_{{ i }} = min(row_from + ty + {{ i * (32 // ROWS) }}u, rows - 1u);
    let q_at_{{ i }} = query_at(P.q_at, b, kh * per_kv + from_{{ i }} / queries, from_{{ i }} % queries);
    let o_at_{{ i }} = query_at(P.o_at, b, kh * per_kv + from_{{ i }} / queries, from_{{ i }} % queries);
{% endfor %}

    for (var k_from = first_step(low, 0u, BLOCK_K); k_from < k_last; k_from = next_step(low, k_from, BLOCK_K)) {
{% if HAS_BLOCK_MAP %}
        // Tiles that the mask empties for every row are skipped.
        if (block_map[(index / v_blocks) * P.k_blocks + k_from / BLOCK_K] == 0u) { continue; }
{% endif %}
{% for i in range(ROWS) %}
        var s_{{ i }} = vec4<f32>();
{% endfor %}
{% for i in range(ROWS) %}
        let k_at_{{ i }} = key_at(P.k_at, kb, kh, min(k_from + ty + {{ i * (32 // ROWS) }}u, k_last - 1u));
{% endfor %}
        for (var d = 0u; d < P.head_dim; d += 32u) {
{% for i in range(ROWS) %}
            wg_q[place + {{ i * (32 // ROWS) * 9 }}u] = load_q(q_at_{{ i }}, d + tx * 4u);
            wg_k[place + {{ i * (32 // ROWS) * 9 }}u] = load_k(k_at_{{ i }}, d + tx * 4u);
{% endfor %}
            workgroupBarrier();
            for (var n = 0u; n < 8u{{ TURNS }}; n += 1u) {
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

{% for i in range(ROWS) %}
{% for j in range(4) %}
        s_{{ i }}[{{ j }}] = score(s_{{ i }}[{{ j }}], keys_{{ i }}, b, h_{{ i }}, i_{{ i }}, k_from + tx + {{ 8 * j }}u, position_{{ i }});
{% endfor %}
        var top_{{ i }} = max(max(s_{{ i }}.x, s_{{ i }}.y), max(s_{{ i }}.z, s_{{ i }}.w));
{% if not SUBGROUPS %}
        wg_row[(ty * ROWS + {{ i }}u) * 8u + tx] = top_{{ i }};
{% endif %}
{% endfor %}
{% if not SUBGROUPS %}
        workgroupBarrier();
{% endif %}
{% for i in range(ROWS) %}
{{ over_row("max", "top_" ~ i, "(ty * ROWS + " ~ i ~ "u)") }}
{% if F16_MATH %}
        // Weights of at most 1 / 4, so that four products with any element of V stay below f16's largest number.
        top_{{ i }} += 2.0;
{% endif %}
        if (top_{{ i }} > m_{{ i }}{{ "" if F16_MATH else " + 8.0" }}) {
            let shrink = exp2(m_{{ i }} - top_{{ i }});
            m_{{ i }} = top_{{ i }};
            l_{{ i }} *= shrink;
{% for c in range(V_CHUNKS) %}
            o_{{ i }}_{{ c }} *= shrink;
{% endfor %}
        }
        {
            let p = select(exp2(s_{{ i }} - m_{{ i }}), vec4<f32>(), s_{{ i }} <= vec4<f32>(NEVER));
            l_{{ i }} += p.x + p.y + p.z + p.w;
            // P lies with key tx + 8 n at column tx, component n: V is staged in that order.
            {{ WG_P }}[(ty * ROWS + {{ i }}u) * STRIDE + tx] = {{ "vec4<f16>(p)" if F16_MATH else "p" }};
        }
{% endfor %}

{% if EDGES %}
        // Where some row does not see some key of the tile, what lies there must not reach it: 0 * NaN is NaN.
{% if BY_ELEMENT or HAS_BIAS or HAS_SCORE_MOD %}
        let edge = true;
{% else %}
        let edge = k_from < low.begin{% if HAS_LEFT %} || k_from < high.begin{% endif %} || k_from + BLOCK_K > low.end;
{% endif %}
{% endif %}
{% for i in range(ROWS) %}
        let j_{{ i }} = k_from + ty + {{ i * (32 // ROWS) }}u;
        let v_at_{{ i }} = key_at(P.v_at, kb, kh, min(j_{{ i }}, k_last - 1u));
{% endfor %}
{% for c in range(V_CHUNKS) %}
{% for i in range(ROWS) %}
        // Keys past the last weigh nothing, and what lies there must not matter.
        {{ WG_V }}[place + {{ i * (32 // ROWS) * 9 }}u] = {{ "vec4<f16>" if F16_MATH }}(select(vec4<f32>(), load_v(v_at_{{ i }}, v_from + {{ c * 32 }}u + tx * 4u), j_{{ i }} < k_last));
{% endfor %}
        workgroupBarrier();
{% for careful in ([false, true] if EDGES else [false]) %}
        {{ "if (!edge) " if EDGES and not careful }}{{ "else " if careful }}{
        for (var n = 0u; n < 8u{{ TURNS }}; n += 1u) {
{% for i in range(ROWS) %}
            let p_{{ i }} = {{ WG_P }}[(ty * ROWS + {{ i }}u) * STRIDE + n];
{% endfor %}
{% for j in range(4) %}
            let v_{{ j }} = {{ WG_V }}[(n + {{ j * 8 }}u) * STRIDE + tx];
{% endfor %}
{% for i in range(ROWS) %}
{% if careful %}
{% for j in range(4) %}
            o_{{ i }}_{{ c }} += {{ "vec4<f32>" if F16_MATH }}(select(p_{{ i }}[{{ j }}] * v_{{ j }}, vec4<{{ M }}>(), p_{{ i }}[{{ j }}] == 0.0));
{% endfor %}
{% elif F16_MATH %}
            var sum_{{ i }} = p_{{ i }}.x * v_0;
{% for j in range(1, 4) %}
            sum_{{ i }} = fma(vec4<f16>(p_{{ i }}[{{ j }}]), v_{{ j }}, sum_{{ i }});
{% endfor %}
            o_{{ i }}_{{ c }} += vec4<f32>(sum_{{ i }});
{% else %}
            o_{{ i }}_{{ c }} += p_{{ i }}.x * v_0 + p_{{ i }}.y * v_1 + p_{{ i }}.z * v_2 + p_{{ i }}.w * v_3;
{% endif %}
{% endfor %}
        }
        }
{% endfor %}
        workgroupBarrier();
{% endfor %}
    }

{% if not SUBGROUPS %}
{% for i in range(ROWS) %}
    wg_row[(ty * ROWS + {{ i }}u) * 8u + tx] = l_{{ i }};
    l_{{ i }} = 0.0;
{% endfor %}
    workgroupBarrier();
{% endif %}
{% for i in range(ROWS) %}
{{ over_row("sum", "l_" ~ i, "(ty * ROWS + " ~ i ~ "u)") }}
    let sink_{{ i }} = sink_of(h_{{ i }});
    let last_{{ i }} = max(m_{{ i }}, sink_{{ i }});
    let shrink_{{ i }} = exp2(m_{{ i }} - last_{{ i }});
    let sum_{{ i }} = l_{{ i }} * shrink_{{ i }} + select(0.0, exp2(sink_{{ i }} - last_{{ i }}), sink_{{ i }} > NEVER);
    let over_{{ i }} = select(0.0, shrink_{{ i }} / max(sum_{{ i }}, 1.0e-37), sum_{{ i }} > 0.0);
{% if HAS_LSE %}
    if (row_{{ i }} < rows && tx == 0u && v_from == 0u) {
        lse[P.lse_from + row_number(b, h_{{ i }}, i_{{ i }})] = lse_of(last_{{ i }}, sum_{{ i }});
    }
{% endif %}
{% endfor %}
    // O goes out by way of workgroup memory: whole rows at once.
{% for c in range(V_CHUNKS) %}
{% for i in range(ROWS) %}
    wg_k[(ty * ROWS + {{ i }}u) * STRIDE + tx] = o_{{ i }}_{{ c }} * over_{{ i }};
{% endfor %}
    workgroupBarrier();
{% for i in range(ROWS) %}
    if (row_from + ty + {{ i * (32 // ROWS) }}u < rows) {
        store_o(o_at_{{ i }}, v_from + {{ c * 32 }}u + tx * 4u, wg_k[place + {{ i * (32 // ROWS) * 9 }}u]);
    }
{% endfor %}
    workgroupBarrier();
{% endfor %}
}
