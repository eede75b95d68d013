// prefill_coop: `prefill` with both products, Q K^T and P V, on cooperative matrices of M x M, f16 with f32 sums.
//
//   one workgroup: 64 of the rows of one KV head, one block of at most 128 value columns, 4 subgroups of 16 rows;
//   the rows are the queries of the G = H / Hk heads of the group, one head after the other
//   Q by way of workgroup memory to matrices that stay; O = 0 in matrices; stage the first tile of K
//   for each tile of 32 keys from the first to the last that a row of the block sees:
//     S = Q K^T                                          matrices; S to workgroup memory
//     score; if rowmax S > m + 15: m' = rowmax S - 7, l *= a, a = exp2(m - m')     a team of threads a row
//     P = exp2(S - m) in f16; l += P; stage V with its columns side by side, and the next tile of K
//     where a row that had seen keys has moved m: O by way of workgroup memory, O *= a
//     O += P V                                           matrices
//   O / l by way of workgroup memory; a row that sees no key is zeros
//
// Tricks: two barriers a tile. m stands 7 below the maximum it was taken from, so that P is at most 2^15 and f16
// keeps what is 2^-29 of the largest. No element of a matrix can be reached, so a row of O is scaled in workgroup
// memory: seldom, as m moves only where the maximum grows by more than 8 (and hardly after the first tiles). What is
// not finite in V is staged as zero and added to the rows that see it on that same way. K is read as stored, its rows
// being the columns of K^T; V is transposed while it is staged, four by four, in registers.
//
// PLAIN replaces the matrices by loops, the rest being the same text, so that it is tested where there are none.
//
// Lost, in cycles for 64 multiply-adds at D 128 as RADV estimates them for navi31 (this kernel 0.83, its matrices
// alone 0.5, `prefill` 1.35; at D 64 0.95 and 1.35), without the seldom path: O by way of workgroup memory in every tile
// 1.00; V as stored, its matrices loaded in 16 bits, 0.89; Q's matrices loaded anew for each tile 1.23, for fewer waves;
// 64 keys a tile 0.92; 32 rows a subgroup 1.24 with 161 spills (at D 64 0.82, but more workgroup memory than the 32 KiB
// of Apple); staging in loops that the compiler does not unroll, 1.5. A diagonal product would round O to f16.
{% if F16 %}
enable f16;
{% endif %}
{% if not PLAIN %}
enable wgpu_cooperative_matrix;
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
{% set EDGES = HAS_RIGHT or HAS_LEFT or HAS_PREFIX or HAS_BIAS or HAS_SCORE_MOD or BY_ELEMENT %}

{% set ROWS = 4 * TILES * M %}
{% set A = ["wg_p", "P_STRIDE"] %}
{% set B = {"k": ["wg_k", "K_STRIDE"], "v": ["wg_v", "P_STRIDE"]} %}
{% set C = ["wg_s", "BLOCK_K"] %}
{% include "shared/matrices.wgsl" %}

{% set TEAM = THREADS // ROWS %}
{% set QUADS = BLOCK_K // 4 // TEAM %}
const BLOCK_Q = {{ ROWS }}u;
const BLOCK_K = {{ BLOCK_K }}u;
const V_BLOCK = {{ V_TILES * M }}u;
const K_STRIDE = {{ D_TILES * M + 8 }}u;
const P_STRIDE = {{ BLOCK_K + 8 }}u;   // of P and of V's columns

var<workgroup> wg_k: array<f16, {{ BLOCK_K * (D_TILES * M + 8) }}>;        // keys by D
var<workgroup> wg_v: array<f16, {{ V_TILES * M * (BLOCK_K + 8) }}>;   // Dv by keys
var<workgroup> wg_p: array<f16, {{ ROWS * (BLOCK_K + 8) }}>;          // rows by keys; before, columns of Q
var<workgroup> wg_s: array<f32, {{ ROWS * BLOCK_K }}>;                // rows by keys; or by columns of O
// The tile, by the key behind it, that last asked for O to come to workgroup memory.
var<workgroup> wg_trip: atomic<u32>;
var<workgroup> wg_block: vec2<u32>;

{% macro over_row(op, out) %}
{# The maximum or sum over a row's threads. #}
{% for step in [1, 2, 4] if step < TEAM %}
        {{ out }} = {{ "max(" ~ out ~ ", " if op == "max" else "(" ~ out ~ " + " }}subgroupShuffleXor({{ out }}, {{ step }}u));
{% endfor %}
{% endmacro %}

{% macro stage_k(from) %}
{% set EIGHTS = D_TILES * M // 8 %}
{% for turn in range(turns_of(BLOCK_K * EIGHTS) | int) %}
        {{ each_of(BLOCK_K * EIGHTS, turn) }}
            let at = key_at(P.k_at, kb, kh, min({{ from }} + n / {{ EIGHTS }}u, k_last - 1u));
            let d = n % {{ EIGHTS }}u * 8u;
            let to = n / {{ EIGHTS }}u * K_STRIDE + d;
            let low = vec4<f16>(load_k(at, d));
            let high = vec4<f16>(load_k(at, d + 4u));
{% for e in range(4) %}
            wg_k[to + {{ e }}u] = low[{{ e }}];
{% endfor %}
{% for e in range(4) %}
            wg_k[to + {{ 4 + e }}u] = high[{{ e }}];
{% endfor %}
        }
{% endfor %}
{% endmacro %}

{% macro next_tile(name) %}
{% if HAS_BLOCK_MAP %}
        // Tiles that the mask empties for every row are skipped.
        while ({{ name }} < k_last && block_map[(index / v_blocks) * P.k_blocks + {{ name }} / BLOCK_K] == 0u) { {{ name }} += BLOCK_K; }
{% endif %}
{% endmacro %}

{# A chunk of O, BLOCK_K columns of it, to workgroup memory or back. #}
{% set O_CHUNK = BLOCK_K // M %}
{% macro move_o(chunk, back) %}
        {{ "{" if back else owners() }}
{% for i in range(TILES) %}
{% for t in range(chunk * O_CHUNK, V_TILES if (chunk + 1) * O_CHUNK > V_TILES else (chunk + 1) * O_CHUNK) %}
{% set at = "tile_row * BLOCK_K + " ~ (i * M * BLOCK_K + (t - chunk * O_CHUNK) * M) ~ "u" %}
{% if back %}
            o_{{ i }}_{{ t }} = {{ load_c(at) }};
{% else %}
            {{ store_c("o_" ~ i ~ "_" ~ t, at) }}
{% endif %}
{% endfor %}
{% endfor %}
        {{ "}" if back else end_owners() }}
{% endmacro %}

{% if EDGES %}
fn not_finite(x: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u)) == vec4<u32>(0x7f800000u);
}
{% endif %}

@compute @workgroup_size({{ THREADS }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_id) subgroup_id: u32,
    @builtin(subgroup_size) lanes: u32,
    @builtin(subgroup_invocation_id) lane_id: u32,
) {
{{ who() }}
    let v_blocks = (P.value_dim + V_BLOCK - 1u) / V_BLOCK;
    let index = P.block_from + workgroup_index(group, groups);
    let v_from = (index % v_blocks) * V_BLOCK;
    let per_kv = P.heads / P.kv_heads;
    // That a whole workgroup goes on or returns is told to the compiler by a uniform load.
    if (thread == 0u) {
        wg_block = select(block_at(index / v_blocks % P.blocks, BLOCK_Q, per_kv), vec2<u32>(P.batch, 0u), index >= P.count);
    }
    let block = workgroupUniformLoad(&wg_block);
    if (block.x >= P.batch) { return; }
{{ tile_of("BLOCK_Q") }}
    // In the softmax a thread has every {{ TEAM }}th four keys of one row; in the products a subgroup has {{ TILES * M }} rows.
    let team_row = thread / {{ TEAM }}u;
    let part = thread % {{ TEAM }}u;
    let tile_row = first_tile * {{ TILES * M }}u;
    let row = row_from + team_row;
    let h = kh * per_kv + min(row, rows - 1u) / queries;
    let i = min(row, rows - 1u) % queries;
    let position = start + i32(i);
    let keys = keys_of(b, position, length);
    var m = NEVER;
    var l = 0.0;

    // Q, by way of P's place.
    let q_at = query_at(P.q_at, b, h, i);
{% for c in range(0, D_TILES * M, BLOCK_K) %}
    for (var n = part; n < {{ BLOCK_K // 4 }}u; n += {{ TEAM }}u) {
        let x = vec4<f16>(load_q(q_at, {{ c }}u + n * 4u));
{% for e in range(4) %}
        wg_p[team_row * P_STRIDE + n * 4u + {{ e }}u] = x[{{ e }}];
{% endfor %}
    }
    workgroupBarrier();
{% for i in range(TILES) %}
{% for t in range(c // M, D_TILES if (c + BLOCK_K) // M > D_TILES else (c + BLOCK_K) // M) %}
    let q_{{ i }}_{{ t }} = {{ hold_a("(tile_row + " ~ (i * M) ~ "u) * P_STRIDE + " ~ (t * M - c) ~ "u") }};
{% endfor %}
{% endfor %}
    workgroupBarrier();
{% endfor %}
{% for i in range(TILES) %}
{% for t in range(V_TILES) %}
    var o_{{ i }}_{{ t }} = Sum();
{% endfor %}
{% endfor %}

    var k_from = first_step(low, 0u, BLOCK_K);
{{ next_tile("k_from") }}
    if (k_from < k_last) {
{{ stage_k("k_from") }}
    }
    if (thread == 0u) { atomicStore(&wg_trip, 0u); }
    workgroupBarrier();
    loop {
        if (k_from >= k_last) { break; }
        var k_next = next_step(low, k_from, BLOCK_K);
{{ next_tile("k_next") }}
        {
{% for t in range(BLOCK_K // M) %}
{% for i in range(TILES) %}
            var s_{{ i }}_{{ t }} = Sum();
{% endfor %}
{% endfor %}
{% for d in range(D_TILES) %}
{% for t in range(BLOCK_K // M) %}
            let k_{{ d }}_{{ t }} = {{ load_b("k", t * M ~ "u * K_STRIDE + " ~ d * M ~ "u") }};
{% for i in range(TILES) %}
            s_{{ i }}_{{ t }} = {{ multiply_add_held("k", "q_" ~ i ~ "_" ~ d, "k_" ~ d ~ "_" ~ t, "s_" ~ i ~ "_" ~ t) }};
{% endfor %}
{% endfor %}
{% endfor %}
            {{ owners() }}
{% for t in range(BLOCK_K // M) %}
{% for i in range(TILES) %}
            {{ store_c("s_" ~ i ~ "_" ~ t, "tile_row * BLOCK_K + " ~ (i * M * BLOCK_K + t * M) ~ "u") }}
{% endfor %}
{% endfor %}
            {{ end_owners() }}
        }
        workgroupBarrier();

        // Teams start at different fours of their rows, which lie on the same banks.
        var top = NEVER;
{% for n in range(QUADS) %}
        let j_{{ n }} = ((team_row + {{ n }}u) % {{ QUADS }}u * {{ TEAM }}u + part) * 4u;
        var s_{{ n }} = vec4<f32>();
{% for e in range(4) %}
        s_{{ n }}[{{ e }}] = score(wg_s[team_row * BLOCK_K + j_{{ n }} + {{ e }}u], keys, b, h, i, k_from + j_{{ n }} + {{ e }}u, position);
{% endfor %}
        top = max(top, max(max(s_{{ n }}.x, s_{{ n }}.y), max(s_{{ n }}.z, s_{{ n }}.w)));
{% endfor %}
{{ over_row("max", "top") }}
        var shrink = 1.0;
        if (top > m + 15.0) {
            // Only what is there must shrink.
            if (m > NEVER) {
                shrink = exp2(m - top + 7.0);
                atomicStore(&wg_trip, k_next);
            }
            m = top - 7.0;
            l *= shrink;
        }
{% for n in range(QUADS) %}
        let p_{{ n }} = select(exp2(s_{{ n }} - m), vec4<f32>(), s_{{ n }} <= vec4<f32>(NEVER));
        l += p_{{ n }}.x + p_{{ n }}.y + p_{{ n }}.z + p_{{ n }}.w;
{% for e in range(4) %}
        wg_p[team_row * P_STRIDE + j_{{ n }} + {{ e }}u] = f16(p_{{ n }}[{{ e }}]);
{% endfor %}
{% endfor %}

        // V with its columns side by side: four keys by four columns at a time.
{% set FOURS = BLOCK_K // 4 * (V_TILES * M // 4) %}
{% for turn in range(turns_of(FOURS) | int) %}
        {{ each_of(FOURS, turn) }}
            let j = n % {{ BLOCK_K // 4 }}u * 4u;
            let d = n / {{ BLOCK_K // 4 }}u * 4u;
{% for e in range(4) %}
            // Keys past the last weigh nothing, and what lies there must not matter.
            let at_{{ e }} = key_at(P.v_at, kb, kh, min(k_from + j + {{ e }}u, k_last - 1u));
{% if EDGES %}
            var x_{{ e }} = select(vec4<f32>(), load_v(at_{{ e }}, v_from + d), k_from + j + {{ e }}u < k_last);
            if (any(not_finite(x_{{ e }}))) {
                x_{{ e }} = select(x_{{ e }}, vec4<f32>(), not_finite(x_{{ e }}));
                atomicStore(&wg_trip, k_next);
            }
            let v_{{ e }} = vec4<f16>(x_{{ e }});
{% else %}
            let v_{{ e }} = select(vec4<f16>(), vec4<f16>(load_v(at_{{ e }}, v_from + d)), k_from + j + {{ e }}u < k_last);
{% endif %}
{% endfor %}
{% for c in range(4) %}
{% for e in range(4) %}
            wg_v[(d + {{ c }}u) * P_STRIDE + j + {{ e }}u] = v_{{ e }}[{{ c }}];
{% endfor %}
{% endfor %}
        }
{% endfor %}
        if (k_next < k_last) {
{{ stage_k("k_next") }}
        }
        workgroupBarrier();

        // The same for the whole workgroup; naga, which cannot know, looks at branches and not at loops.
        loop {
            if (atomicLoad(&wg_trip) != k_next) { break; }
{% for chunk in range((V_TILES + O_CHUNK - 1) // O_CHUNK) %}
{{ move_o(chunk, false) }}
            workgroupBarrier();
            for (var n = part * 4u; n < BLOCK_K{{ ROLL }}; n += {{ TEAM * 4 }}u) {
                let at = team_row * BLOCK_K + n;
                var x = vec4<f32>(wg_s[at], wg_s[at + 1u], wg_s[at + 2u], wg_s[at + 3u]) * shrink;
{% if EDGES %}
                // What is not finite is not in wg_v, and reaches only the rows that see it: 0 * NaN is NaN.
                for (var j = 0u; j < BLOCK_K && k_from + j < k_last; j += 1u) {
                    let p = f32(wg_p[team_row * P_STRIDE + j]);
                    if (p == 0.0) { continue; }
                    let y = load_v(key_at(P.v_at, kb, kh, k_from + j), v_from + {{ chunk * BLOCK_K }}u + n);
                    x += select(vec4<f32>(), p * y, not_finite(y));
                }
{% endif %}
{% for e in range(4) %}
                wg_s[at + {{ e }}u] = x[{{ e }}];
{% endfor %}
            }
            workgroupBarrier();
{{ move_o(chunk, true) }}
            workgroupBarrier();
{% endfor %}
            break;
        }

{% for t in range(BLOCK_K // M) %}
{% for i in range(TILES) %}
        let p_{{ i }}_{{ t }} = {{ load_a("(tile_row + " ~ (i * M) ~ "u) * P_STRIDE + " ~ (t * M) ~ "u") }};
{% endfor %}
{% for d in range(V_TILES) %}
        let v_{{ d }}_{{ t }} = {{ load_b("v", d * M ~ "u * P_STRIDE + " ~ t * M ~ "u") }};
{% for i in range(TILES) %}
        o_{{ i }}_{{ d }} = {{ multiply_add("v", "p_" ~ i ~ "_" ~ t, "v_" ~ d ~ "_" ~ t, "o_" ~ i ~ "_" ~ d) }};
{% endfor %}
{% endfor %}
{% endfor %}
        k_from = k_next;
    }

{{ over_row("sum", "l") }}
    let sink = sink_of(h);
    let last = max(m, sink);
    let shrink = exp2(m - last);
    let sum = l * shrink + select(0.0, exp2(sink - last), sink > NEVER);
    let over = select(0.0, shrink / max(sum, 1.0e-37), sum > 0.0);
{% if HAS_LSE %}
    if (row < rows && part == 0u && v_from == 0u) {
        lse[P.lse_from + row_number(b, h, i)] = lse_of(last, sum);
    }
{% endif %}
    let o_at = query_at(P.o_at, b, h, i);
{% for chunk in range((V_TILES + O_CHUNK - 1) // O_CHUNK) %}
{{ move_o(chunk, false) }}
    workgroupBarrier();
    for (var n = part * 4u; n < BLOCK_K{{ ROLL }}; n += {{ TEAM * 4 }}u) {
        let at = team_row * BLOCK_K + n;
        if (row < rows && {{ chunk * BLOCK_K }}u + n < V_BLOCK) {
            store_o(o_at, v_from + {{ chunk * BLOCK_K }}u + n, vec4<f32>(wg_s[at], wg_s[at + 1u], wg_s[at + 2u], wg_s[at + 3u]) * over);
        }
    }
    workgroupBarrier();
{% endfor %}
}
