// decode: O = softmax(score(Q K^T)) V for a few query rows, one part of the key axis a workgroup.
//
//   m, l, O = NEVER, 0, 0
//   for each 256 keys of this part:
//     thread = 4 keys:         s[r] = score(q[r] . k)
//     all:                     m' = max(m, max s); P = exp2(s - m')
//     thread = (4 columns, slice of the keys):  O[r] = O[r] * a + sum over its keys of P[r] V
//   add the slices up; O / l, or (O, m, l) for `merge` where the key axis has several parts
//
// Tricks: two barriers for 256 keys, since maxima and weights lie in arrays of their own; every thread
// finds the maximum for itself by broadcast reads, which costs less than a tree of barriers.
{% if F16 %}
enable f16;
{% endif %}
{% include "shared/decode.wgsl" %}
{% set CAREFUL = FEW_SEE or HAS_BIAS or HAS_SCORE_MOD or HAS_MASK or HAS_MASK_MOD %}

const ROWS = {{ ROWS }}u;
const STEP = 256u;              // keys a step, four a thread
const QUADS = {{ QUADS }}u;     // vec4s in a row of Q
const COLUMNS = {{ COLUMNS }}u; // vec4 columns of V that are summed at once
const SLICES = {{ SLICES }}u;   // slices of the keys, COLUMNS threads each

var<workgroup> wg_q: array<vec4<f32>, {{ ROWS * QUADS }}>;
var<workgroup> wg_m: array<f32, {{ ROWS * 64 }}>;         // each thread's maximum, 64 a row
var<workgroup> wg_p: array<f32, {{ ROWS * 256 }}>;        // weights, 256 a row
var<workgroup> wg_over: array<vec2<f32>, ROWS>;
var<workgroup> wg_o: array<vec4<f32>, 64>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
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

    let column = thread % COLUMNS;
    let slice = thread / COLUMNS;

    for (var j_from = work.from_key; j_from < work.to_key; j_from = next_step(work.low, j_from, STEP)) {
{% for r in range(ROWS) %}
        var s_{{ r }} = vec4<f32>();
{% endfor %}
        for (var e = 0u; e < 4u{{ ROLL }}; e += 1u) {
            let j = j_from + thread + 64u * e;
{% for r in range(ROWS) %}
            var x_{{ r }} = 0.0;
{% endfor %}
            if (j < work.to_key) {
                let at = key_at(P.k_at, work.kb, work.kh, j);
                for (var n = 0u; n < QUADS{{ ROLL }}; n += 1u) {
                    let x = load_k(at, n * 4u);
{% for r in range(ROWS) %}
                    x_{{ r }} += dot(wg_q[{{ r }}u * QUADS + n], x);
{% endfor %}
                }
            }
{% for r in range(ROWS) %}
            // The keys of this part end at to_key, those of the row perhaps later.
            x_{{ r }} = select(NEVER, score(x_{{ r }}, keys_{{ r }}, work.b, row_{{ r }}.x, row_{{ r }}.y, j, position_{{ r }}), j < work.to_key);
            s_{{ r }} = vec4<f32>(s_{{ r }}.yzw, x_{{ r }});
{% endfor %}
        }
{% for r in range(ROWS) %}
        wg_m[{{ r * 64 }}u + thread] = max(max(s_{{ r }}.x, s_{{ r }}.y), max(s_{{ r }}.z, s_{{ r }}.w));
{% endfor %}
        workgroupBarrier();
{% for r in range(ROWS) %}
        var new_{{ r }} = m_{{ r }};
        for (var n = 0u; n < 64u{{ ROLL }}; n += 1u) { new_{{ r }} = max(new_{{ r }}, wg_m[{{ r * 64 }}u + n]); }
        let shrink_{{ r }} = exp2(m_{{ r }} - new_{{ r }});
        m_{{ r }} = new_{{ r }};
        let p_{{ r }} = select(exp2(s_{{ r }} - new_{{ r }}), vec4<f32>(), s_{{ r }} <= vec4<f32>(NEVER));
        l_{{ r }} = l_{{ r }} * shrink_{{ r }} + p_{{ r }}.x + p_{{ r }}.y + p_{{ r }}.z + p_{{ r }}.w;
{% for e in range(4) %}
        wg_p[{{ r * 256 + 64 * e }}u + thread] = p_{{ r }}[{{ e }}];
{% endfor %}
{% for c in range(CHUNKS) %}
        o_{{ r }}_{{ c }} *= shrink_{{ r }};
{% endfor %}
{% endfor %}
        workgroupBarrier();
        if (slice < SLICES) {
            let n_keys = min(STEP, work.to_key - j_from);
            for (var n = slice; n < n_keys; n += SLICES) {
                let at = key_at(P.v_at, work.kb, work.kh, j_from + n);
{% for c in range(CHUNKS) %}
                let v_{{ c }} = load_v(at, (column + {{ c }}u * COLUMNS) * 4u);
{% endfor %}
{% for r in range(ROWS) %}
                let w_{{ r }} = wg_p[{{ r * 256 }}u + n];
{% for c in range(CHUNKS) %}
{% if CAREFUL %}
                o_{{ r }}_{{ c }} += select(w_{{ r }} * v_{{ c }}, vec4<f32>(), w_{{ r }} == 0.0);
{% else %}
                o_{{ r }}_{{ c }} += w_{{ r }} * v_{{ c }};
{% endif %}
{% endfor %}
{% endfor %}
            }
        }
        workgroupBarrier();
    }

{% for r in range(ROWS) %}
    wg_m[{{ r * 64 }}u + thread] = l_{{ r }};
{% endfor %}
    workgroupBarrier();
    // A thread a row: the sum of the threads' parts of l.
    if (thread < ROWS) {
        var top = m_0;
{% for r in range(1, ROWS) %}
        if (thread == {{ r }}u) { top = m_{{ r }}; }
{% endfor %}
        var sum = 0.0;
        for (var n = 0u; n < 64u{{ ROLL }}; n += 1u) { sum += wg_m[thread * 64u + n]; }
        wg_over[thread] = finish_row(work, thread, top, sum);
    }
    // The sum of the slices' parts of O.
{% for r in range(ROWS) %}
{% for c in range(CHUNKS) %}
    workgroupBarrier();
    wg_o[thread] = o_{{ r }}_{{ c }};
    workgroupBarrier();
    if (thread < COLUMNS) {
        var sum = vec4<f32>();
        for (var n = 0u; n < SLICES{{ ROLL }}; n += 1u) { sum += wg_o[n * COLUMNS + thread]; }
        write_row(work, {{ r }}u, (thread + {{ c }}u * COLUMNS) * 4u, sum * wg_over[{{ r }}].x * wg_over[{{ r }}].y);
    }
{% endfor %}
{% endfor %}
}
