// prefill_lanes: what `prefill` computes, with queries, keys and weights passed between the lanes of a subgroup.
//
//   one workgroup is one team of LANES lanes: ROWS of the rows of one KV head, one block of value columns
//   m, l, O = NEVER, 0, 0                 every lane holds m of each row, its own share of l, and of O the
//                                         columns 4 lane .. 4 lane + 3 of each chunk
//   for each tile of 4 LANES keys that a row of the block may see:
//     lane = 4 keys; for each 4 columns of D: a lane reads its keys and a row of Q, which it passes on;
//       S[r] += Q[r] K^T
//     score; where rowmax S, by shuffles, > m + 8: m' = rowmax S; l, O = l * a, O * a, a = exp2(m - m')
//     P = exp2(S - m); l += P
//     lane = 4 columns a chunk; for each 2 keys: O[r] += shuffle(P[r]) V
//   O / l; a row that sees no key is zeros
//
// Tricks: no workgroup memory and no barrier, which a processor pays dearly for; a lane's read of four columns
// costs it as much as 50 multiply-adds, as each word is a read of its own with a check of its bounds, so that many rows
// and keys share what is read, and f16 is read as half as many words; what is done once a row is a loop over the rows
// and picks the row's registers, which compiles fast.
//
// Lost, on llvmpipe (Mesa 25.0, two cores) with 8 heads of 512 x 512, D 64, where 24 rows take 10.7 ms (50
// GFLOP/s) and two fifths of that are reads: 16 rows, 12.9 ms; 32 rows, 9.9 ms, but half as much more to compile, which
// is then above a second; 40 rows, 10.4 ms; 4 keys of V a turn, as fast and a tenth more to compile; O rescaled without
// a look at whether any row's maximum grows, as fast and a tenth more; f32 read as u64, two numbers each, as fast; the
// next columns read among the multiply-adds, 13.4 ms; rows of Q read at one address by all lanes, 34 ms.
{% if F16 %}
enable f16;
{% endif %}
{% set HOLES = HAS_BIAS or HAS_SCORE_MOD or HAS_MASK or HAS_MASK_MOD %}
{% if BROWSER %}
enable subgroups;
// That a vote of the subgroup is the same in all its lanes is not known to the analysis.
diagnostic(off, subgroup_uniformity);
{% endif %}
{% from "shared/rows.wgsl" import element, out_element, row_loader, row_writer %}
{% set lse = [["lse", "read_write", "f32"]] if HAS_LSE else [] %}
{% set map = [["block_map", "read", "u32"]] if HAS_BLOCK_MAP else [] %}
{% set buffers = [["q", "read", element(Q_TYPE, VEC)], ["k", "read", element(K_TYPE, VEC)], ["v", "read", element(V_TYPE, VEC)], ["o", "read_write", out_element(O_TYPE, VEC)]] + lse + map %}
{% from "shared/tile.wgsl" import tile_of %}
{% include "shared/problem.wgsl" %}
{% include "shared/score.wgsl" %}
{{ row_loader("q", Q_TYPE, "head_dim", "x", VEC, true) }}
{{ row_loader("k", K_TYPE, "head_dim", "y", VEC, true) }}
{{ row_loader("v", V_TYPE, "value_dim", "z", VEC, V_WHOLE) }}
{{ row_writer("o", O_TYPE, "value_dim", VEC) }}
{% set LAW = HAS_SOFTCAP or HAS_BIAS or HAS_ALIBI or HAS_T5 or HAS_SCORE_MOD or HAS_MASK or HAS_MASK_MOD %}
{% set OWN = (ROWS + LANES - 1) // LANES %}

const ROWS = {{ ROWS }}u;
const LANES = {{ LANES }}u;
const BLOCK_K = {{ 4 * LANES }}u;
const V_BLOCK = {{ 4 * LANES * V_CHUNKS }}u;

{# One of the values that a template's name numbers by rows. #}
{% macro pick(name, type, r) %}
        var {{ name }} = {{ name }}_0;
{% for n in range(1, ROWS) %}
        {{ name }} = select({{ name }}, {{ name }}_{{ n }}, {{ r }} == {{ n }}u);
{% endfor %}
{% endmacro %}

@compute @workgroup_size({{ LANES }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let v_blocks = (P.value_dim + V_BLOCK - 1u) / V_BLOCK;
    let index = P.block_from + workgroup_index(group, groups);
    if (index >= P.count) { return; }
    let v_from = (index % v_blocks) * V_BLOCK;
    let per_kv = P.heads / P.kv_heads;
    let block = block_at(index / v_blocks % P.blocks, ROWS, per_kv);
    if (block.x >= P.batch) { return; }
{{ tile_of("ROWS") }}
    // Rows lane, lane + LANES, .. are a lane's own to read: past the last they repeat it.
{% for n in range(OWN) %}
    let row_{{ n }} = min(row_from + min(lane + {{ n }}u * LANES, ROWS - 1u), rows - 1u);
    let h_{{ n }} = kh * per_kv + row_{{ n }} / queries;
    let i_{{ n }} = row_{{ n }} % queries;
    let q_at_{{ n }} = query_at(P.q_at, b, h_{{ n }}, i_{{ n }});
    let keys_{{ n }} = keys_of(b, start + i32(i_{{ n }}), length);
{% endfor %}
{% for r in range(ROWS) %}
    var m_{{ r }} = NEVER;
    var l_{{ r }} = 0.0;
{% for c in range(V_CHUNKS) %}
    var o_{{ c }}_{{ r }} = vec4<f32>();
{% endfor %}
{% endfor %}

    for (var k_from = first_step(low, 0u, BLOCK_K); k_from < k_last; k_from = next_step(low, k_from, BLOCK_K)) {
{% if HAS_BLOCK_MAP %}
        // Tiles that the mask empties for every row are skipped.
        if (block_map[(index / v_blocks) * P.k_blocks + k_from / BLOCK_K] == 0u) { continue; }
{% endif %}
{% for e in range(4) %}
        let k_at_{{ e }} = key_at(P.k_at, kb, kh, min(k_from + {{ e }}u * LANES + lane, k_last - 1u));
{% endfor %}
{% for r in range(ROWS) %}
        var s_{{ r }} = vec4<f32>();
{% endfor %}
        for (var d = 0u; d < P.head_dim; d += 4u) {
{% for e in range(4) %}
            let k_{{ e }} = load_k(k_at_{{ e }}, d);
{% endfor %}
{% for x in ["x", "y", "z", "w"] %}
            let k_{{ x }} = vec4<f32>(k_0.{{ x }}, k_1.{{ x }}, k_2.{{ x }}, k_3.{{ x }});
{% endfor %}
{% for n in range(OWN) %}
            let q_own_{{ n }} = load_q(q_at_{{ n }}, d);
{% endfor %}
{% for r in range(ROWS) %}
            {
                let q = subgroupBroadcast(q_own_{{ r // LANES }}, {{ r % LANES }}u);
                s_{{ r }} = fma(vec4<f32>(q.x), k_x, s_{{ r }});
                s_{{ r }} = fma(vec4<f32>(q.y), k_y, s_{{ r }});
                s_{{ r }} = fma(vec4<f32>(q.z), k_z, s_{{ r }});
                s_{{ r }} = fma(vec4<f32>(q.w), k_w, s_{{ r }});
            }
{% endfor %}
        }

        // Where some row does not see some key of the tile.
        {{ "var" if HOLES else "let" }} edge = k_from < low.begin || k_from < high.begin || k_from + BLOCK_K > low.end;
{% if LAW %}
{% if HOLES %}
        var lowest = 0.0;
{% endif %}
        for (var r = 0u; r < ROWS{{ ROLL }}; r += 1u) {
{{ pick("s", "vec4<f32>", "r") }}
{% for x in ["h", "i"] %}
            var {{ x }} = subgroupShuffle({{ x }}_0, r % LANES);
{% for n in range(1, OWN) %}
            {{ x }} = select({{ x }}, subgroupShuffle({{ x }}_{{ n }}, r % LANES), r / LANES == {{ n }}u);
{% endfor %}
{% endfor %}
            let position = start + i32(i);
            let keys = keys_of(b, position, length);
{% for e in range(4) %}
            s[{{ e }}] = score(s[{{ e }}], keys, b, h, i, k_from + {{ e }}u * LANES + lane, position);
{% endfor %}
{% if HOLES %}
            lowest = min(lowest, min(min(s.x, s.y), min(s.z, s.w)));
{% endif %}
{% for n in range(ROWS) %}
            s_{{ n }} = select(s_{{ n }}, s, r == {{ n }}u);
{% endfor %}
        }
{% if HOLES %}
        edge = edge || subgroupAny(lowest <= NEVER);
{% endif %}
{% else %}
        if (edge) {
{% for r in range(ROWS) %}
            {
                let keys = Keys(
                    subgroupBroadcast(keys_{{ r // LANES }}.begin, {{ r % LANES }}u),
                    subgroupBroadcast(keys_{{ r // LANES }}.end, {{ r % LANES }}u),
                    keys_{{ r // LANES }}.prefix,
                );
{% for e in range(4) %}
                s_{{ r }}[{{ e }}] = score(s_{{ r }}[{{ e }}], keys, b, 0u, 0u, k_from + {{ e }}u * LANES + lane, 0);
{% endfor %}
            }
{% endfor %}
        } else {
{% for r in range(ROWS) %}
            s_{{ r }} *= P.scale * LOG2_E;
{% endfor %}
        }
{% endif %}

        // Where some lane has a score that moves its row's maximum enough.
        var grows = false;
{% for r in range(ROWS) %}
        let top_{{ r }} = max(max(s_{{ r }}.x, s_{{ r }}.y), max(s_{{ r }}.z, s_{{ r }}.w));
        grows = grows || top_{{ r }} > m_{{ r }} + 8.0;
{% endfor %}
        if (subgroupAny(grows)) {
            for (var r = 0u; r < ROWS{{ ROLL }}; r += 1u) {
{{ pick("top", "f32", "r") }}
{{ pick("m", "f32", "r") }}
{% for step in [1, 2, 4, 8, 16, 32] %}{% if step < LANES %}
                top = max(top, subgroupShuffleXor(top, {{ step }}u));
{% endif %}{% endfor %}
                let grown = select(m, top, top > m + 8.0);
                let shrink = exp2(m - grown);
{% for n in range(ROWS) %}
                m_{{ n }} = select(m_{{ n }}, grown, r == {{ n }}u);
                l_{{ n }} *= select(1.0, shrink, r == {{ n }}u);
{% for c in range(V_CHUNKS) %}
                o_{{ c }}_{{ n }} *= select(1.0, shrink, r == {{ n }}u);
{% endfor %}
{% endfor %}
            }
        }
{% for r in range(ROWS) %}
        let p_{{ r }} = select(exp2(s_{{ r }} - m_{{ r }}), vec4<f32>(), s_{{ r }} <= vec4<f32>(NEVER));
        l_{{ r }} += p_{{ r }}.x + p_{{ r }}.y + p_{{ r }}.z + p_{{ r }}.w;
{% endfor %}

        if (!edge) {
            for (var n = 0u; n < BLOCK_K / 2u{{ ROLL }}; n += 1u) {
                // Keys 0 and 1 of a lane, then its keys 2 and 3.
                let far = n >= LANES;
{% for e in range(2) %}
                let v_at_{{ e }} = key_at(P.v_at, kb, kh, k_from + select({{ e }}u, {{ e + 2 }}u, far) * LANES + n % LANES);
{% for c in range(V_CHUNKS) %}
                let v_{{ e }}_{{ c }} = load_v(v_at_{{ e }}, v_from + (lane + {{ c }}u * LANES) * 4u);
{% endfor %}
{% endfor %}
{% for r in range(ROWS) %}
                {
                    let w = subgroupShuffle(select(p_{{ r }}.xy, p_{{ r }}.zw, far), n % LANES);
{% for c in range(V_CHUNKS) %}
                    o_{{ c }}_{{ r }} = fma(vec4<f32>(w.y), v_1_{{ c }}, fma(vec4<f32>(w.x), v_0_{{ c }}, o_{{ c }}_{{ r }}));
{% endfor %}
                }
{% endfor %}
            }
        } else {
            // What lies where a row does not see must not reach it: 0 * NaN is NaN.
            for (var n = 0u; n < BLOCK_K{{ ROLL }}; n += 1u) {
                let e = n / LANES;
                let v_at = key_at(P.v_at, kb, kh, min(k_from + n, k_last - 1u));
{% for c in range(V_CHUNKS) %}
                let v_{{ c }} = load_v(v_at, v_from + (lane + {{ c }}u * LANES) * 4u);
{% endfor %}
{% for r in range(ROWS) %}
                {
                    let w = subgroupShuffle(select(select(p_{{ r }}.x, p_{{ r }}.y, e == 1u), select(p_{{ r }}.z, p_{{ r }}.w, e == 3u), e >= 2u), n % LANES);
{% for c in range(V_CHUNKS) %}
                    o_{{ c }}_{{ r }} += select(w * v_{{ c }}, vec4<f32>(), w == 0.0);
{% endfor %}
                }
{% endfor %}
            }
        }
    }

    for (var r = 0u; r < ROWS{{ ROLL }}; r += 1u) {
{{ pick("m", "f32", "r") }}
{{ pick("l", "f32", "r") }}
{% for c in range(V_CHUNKS) %}
{{ pick("o_" ~ c, "vec4<f32>", "r") }}
{% endfor %}
{% for step in [1, 2, 4, 8, 16, 32] %}{% if step < LANES %}
        l += subgroupShuffleXor(l, {{ step }}u);
{% endif %}{% endfor %}
        let row = row_from + r;
        let h = kh * per_kv + min(row, rows - 1u) / queries;
        let i = min(row, rows - 1u) % queries;
        let sink = sink_of(h);
        let last = max(m, sink);
        let shrink = exp2(m - last);
        let sum = l * shrink + select(0.0, exp2(sink - last), sink > NEVER);
        let over = select(0.0, shrink / max(sum, 1.0e-37), sum > 0.0);
        if (row < rows) {
{% if HAS_LSE %}
            if (lane == 0u && v_from == 0u) { lse[P.lse_from + row_number(b, h, i)] = lse_of(last, sum); }
{% endif %}
{% for c in range(V_CHUNKS) %}
            store_o(query_at(P.o_at, b, h, i), v_from + (lane + {{ c }}u * LANES) * 4u, o_{{ c }} * over);
{% endfor %}
        }
    }
}
