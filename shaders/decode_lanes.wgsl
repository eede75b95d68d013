// decode_lanes: what `decode` computes, with keys and weights passed between the lanes of a subgroup.
//
//   a team of LANES lanes holds m, l and O of its own; the teams of the workgroup take turns at the keys
//   for each KEYS * LANES keys:
//     lane = KEYS keys:        s[r] = score(q[r] . k)
//     team:                    m' = max(m, max s) by shuffles; p = exp2(s - m')
//     lane = 4 columns (and every LANES-th further):  for each key: O[r] = O[r] * a + shuffle(p[r], key) V
//   merge the teams; O / l, or (O, m, l) for `merge` where the key axis has several parts
//
// Tricks: no barrier and no workgroup memory in the loop but for reads of Q; each row of V is read by the
// team at once; several keys a lane share what is read of Q. Where reads of workgroup memory are dear (on a
// processor each lane makes one of its own), a lane reads one row of Q and the team passes it on. LANES is at most the smallest subgroup of the device, so any size of it will do.
//
// Lost, on llvmpipe with 16 rows, 512 keys and D 64, on a busy machine where this took 1.6 ms: one key a lane
// with Q read from workgroup memory, 2.8 ms; the loop over a team's keys unrolled, for constant shuffles, 3.1 ms
// and 26 s of compiling; an epilogue unrolled over the rows, 15 s of compiling where this takes one.
{% if F16 %}
enable f16;
{% endif %}
{% if BROWSER %}
enable subgroups;
{% endif %}
{% include "shared/decode.wgsl" %}
{% set CAREFUL = FEW_SEE or HAS_BIAS or HAS_SCORE_MOD or HAS_MASK or HAS_MASK_MOD %}

{# With the heads and positions of rows, which these scores keep, the values unrolled spilled on DG2. #}
{% set VALUES_ROLL = " * P.one" if FEW_REGISTERS and (HAS_ALIBI or HAS_T5) else ROLL %}

const ROWS = {{ ROWS }}u;
const QUADS = {{ QUADS }}u;     // vec4s in a row of Q
const LANES = {{ LANES }}u;     // of a team
const TEAMS = {{ 64 // LANES }}u;
const KEYS = {{ KEYS }}u;       // of a lane, a step
const STEP = {{ 64 * KEYS }}u;  // keys of the workgroup, a step

// Mesa unrolls loops over arrays of at most 32 elements, which takes it seconds.
var<workgroup> wg_q: array<vec4<f32>, {{ [ROWS * QUADS, 33] | max }}>;
var<workgroup> wg_m: array<f32, {{ ROWS * (64 // LANES) }}>;
var<workgroup> wg_l: array<f32, {{ ROWS * (64 // LANES) }}>;
var<workgroup> wg_top: array<f32, ROWS>;
var<workgroup> wg_over: array<vec2<f32>, ROWS>;
var<workgroup> wg_o: array<vec4<f32>, {{ ROWS * 64 }}>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) subgroup_lanes: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
) {
    let thread = subgroup * subgroup_lanes + subgroup_lane;
    let index = P.block_from + workgroup_index(group, groups);
    if (index >= P.count) { return; }
    let work = work_of(index);
    if (work.rows == 0u) { return; }
{% if SPLIT %}
    if (work.from_key >= work.to_key) {
        if (thread < ROWS) { write_empty(work, thread); }
        return;
    }
{% endif %}
    let lane = thread % LANES;
    let team = thread / LANES;
    let team_lane = subgroup_lane - lane;   // the team's first lane in the subgroup

    stage_queries(work, thread);
{% for r in range(ROWS) %}
    let row_{{ r }} = row_of(work, {{ r }}u);
    let position_{{ r }} = work.start + i32(row_{{ r }}.y);
    let keys_{{ r }} = keys_of(work.b, position_{{ r }}, work.length);
    var m_{{ r }} = NEVER;
    var l_{{ r }} = 0.0;
{% for c in range(CHUNKS) %}
    var o_{{ r }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}
    workgroupBarrier();

    // Every team takes as many steps, so that shuffles meet all lanes; keys past the end weigh nothing.
    for (var step = work.from_key; step < work.to_key; step = next_step(work.low, step, STEP)) {
        let j_from = step + team * LANES * KEYS;
{% for e in range(KEYS) %}
        let place_{{ e }} = place_of(work.kb, min(j_from + {{ e }}u * LANES + lane, work.to_key - 1u));
        let k_row_{{ e }} = place_at(P.k_at, place_{{ e }}, work.kh);
{% if TABLED %}
        let v_own_{{ e }} = place_at(P.v_at, place_{{ e }}, work.kh);
{% endif %}
{% endfor %}
{% for r in range(ROWS) %}
{% for e in range(KEYS) %}
        var s_{{ r }}_{{ e }} = 0.0;
{% endfor %}
{% endfor %}
        for (var n = 0u; n < QUADS{{ ROLL }}; n += 1u) {
{% for e in range(KEYS) %}
            let x_{{ e }} = load_k(k_row_{{ e }}, n * 4u);
{% endfor %}
{% if Q_BY_LANES %}
            let q_own = wg_q[min(lane, ROWS - 1u) * QUADS + n];
{% endif %}
{% for r in range(ROWS) %}
            let q_{{ r }} = {% if Q_BY_LANES %}subgroupBroadcast(q_own, {{ r }}u){% else %}wg_q[{{ r }}u * QUADS + n]{% endif %};
{% for e in range(KEYS) %}
            s_{{ r }}_{{ e }} += dot(q_{{ r }}, x_{{ e }});
{% endfor %}
{% endfor %}
        }
{% for e in range(KEYS) %}
        {
            let j = j_from + {{ e }}u * LANES + lane;
{% for r in range(ROWS) %}
            s_{{ r }}_{{ e }} = select(NEVER, score(s_{{ r }}_{{ e }}, keys_{{ r }}, work.b, row_{{ r }}.x, row_{{ r }}.y, j, position_{{ r }}), j < work.to_key);
{% endfor %}
        }
{% endfor %}
{% for r in range(ROWS) %}
        var top_{{ r }} = s_{{ r }}_0;
{% for e in range(1, KEYS) %}
        top_{{ r }} = max(top_{{ r }}, s_{{ r }}_{{ e }});
{% endfor %}
{% for step in [1, 2, 4, 8, 16, 32] %}{% if step < LANES %}
        top_{{ r }} = max(top_{{ r }}, subgroupShuffleXor(top_{{ r }}, {{ step }}u));
{% endif %}{% endfor %}
        if (top_{{ r }} > m_{{ r }} + 8.0) {
            let shrink = exp2(m_{{ r }} - top_{{ r }});
            m_{{ r }} = top_{{ r }};
            l_{{ r }} *= shrink;
{% for c in range(CHUNKS) %}
            o_{{ r }}_{{ c }} *= shrink;
{% endfor %}
        }
{% for e in range(KEYS) %}
        let p_{{ r }}_{{ e }} = select(exp2(s_{{ r }}_{{ e }} - m_{{ r }}), 0.0, s_{{ r }}_{{ e }} <= NEVER);
        l_{{ r }} += p_{{ r }}_{{ e }};
{% endfor %}
{% endfor %}
        for (var n = 0u; n < LANES{{ VALUES_ROLL }}; n += 1u) {
{% for e in range(KEYS) %}
            {
{% if TABLED %}
                // The lane that had the key has asked the table.
                let v_row = subgroupShuffle(v_own_{{ e }}, team_lane + n);
{% else %}
                let v_row = key_at(P.v_at, work.kb, work.kh, min(j_from + {{ e }}u * LANES + n, work.to_key - 1u));
{% endif %}
{% for r in range(ROWS) %}
                let w_{{ r }} = subgroupShuffle(p_{{ r }}_{{ e }}, team_lane + n);
{% endfor %}
{% for c in range(CHUNKS) %}
                let v_{{ c }} = load_v(v_row, (lane + {{ c }}u * LANES) * 4u);
{% for r in range(ROWS) %}
{% if CAREFUL %}
                o_{{ r }}_{{ c }} += select(w_{{ r }} * v_{{ c }}, vec4<f32>(), w_{{ r }} == 0.0);
{% else %}
                o_{{ r }}_{{ c }} += w_{{ r }} * v_{{ c }};
{% endif %}
{% endfor %}
{% endfor %}
            }
{% endfor %}
        }
    }

{% for r in range(ROWS) %}
{% for step in [1, 2, 4, 8, 16, 32] %}{% if step < LANES %}
    l_{{ r }} += subgroupShuffleXor(l_{{ r }}, {{ step }}u);
{% endif %}{% endfor %}
    if (lane == 0u) {
        wg_m[{{ r }}u * TEAMS + team] = m_{{ r }};
        wg_l[{{ r }}u * TEAMS + team] = l_{{ r }};
    }
{% endfor %}
    workgroupBarrier();
    // A thread a row: the teams' maxima and denominators into one.
    if (thread < ROWS) {
        var top = NEVER;
        for (var n = 0u; n < TEAMS{{ ROLL }}; n += 1u) { top = max(top, wg_m[thread * TEAMS + n]); }
        var sum = 0.0;
        for (var n = 0u; n < TEAMS{{ ROLL }}; n += 1u) {
            sum += wg_l[thread * TEAMS + n] * exp2(wg_m[thread * TEAMS + n] - top);
        }
        wg_top[thread] = top;
        wg_over[thread] = finish_row(work, thread, top, sum);
    }
    // The teams' parts of O, chunk by chunk.
    for (var c = 0u; c < {{ CHUNKS }}u{{ ROLL }}; c += 1u) {
        workgroupBarrier();
{% for r in range(ROWS) %}
        var o_{{ r }} = o_{{ r }}_0;
{% for c in range(1, CHUNKS) %}
        o_{{ r }} = select(o_{{ r }}, o_{{ r }}_{{ c }}, c == {{ c }}u);
{% endfor %}
        wg_o[{{ r * 64 }}u + thread] = o_{{ r }} * exp2(m_{{ r }} - wg_top[{{ r }}]);
{% endfor %}
        workgroupBarrier();
        for (var n = thread; n < ROWS * LANES{{ ROLL }}; n += 64u) {
            let r = n / LANES;
            var sum = vec4<f32>();
            for (var t = 0u; t < TEAMS{{ ROLL }}; t += 1u) { sum += wg_o[r * 64u + t * LANES + n % LANES]; }
            write_row(work, r, (n % LANES + c * LANES) * 4u, sum * wg_over[r].x * wg_over[r].y);
        }
    }
}
