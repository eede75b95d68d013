// softmax: W[b, h, i, :] = 2^(W - max) / sum, in place, the second of the three passes.
//
//   one workgroup a row; a row that sees no key becomes zeros
{% set lse = [["lse", "read_write", "f32"]] if HAS_LSE else [] %}
{% set buffers = [["weights", "read_write", "f32"]] + lse %}
{% include "shared/problem.wgsl" %}
{% include "shared/score.wgsl" %}

const THREADS = 64u;
var<workgroup> wg_part: array<f32, 64>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let index = P.block_from + workgroup_index(group, groups);
    if (index >= P.count) { return; }
    let row = row_at(index);
    if (row.x >= P.batch) { return; }
    let b = row.x;
    let h = row.y;
    let i = row.z;
    let length = kv_length(kv_row(b));
    let keys = keys_of(b, q_position(b, length) + i32(i), length);
    let first = first_key(keys);
    let last = last_key(keys);
    let at = P.weights_from + row_number(b, h, i) * P.k_len;

    var top = sink_of(h);
    for (var j = first + thread; j < last; j += THREADS) { top = max(top, weights[at + j]); }
    wg_part[thread] = top;
    workgroupBarrier();
    for (var n = 0u; n < THREADS{{ ROLL }}; n += 1u) { top = max(top, wg_part[n]); }
    workgroupBarrier();

    var sum = 0.0;
    for (var j = first + thread; j < last; j += THREADS) {
        let s = weights[at + j];
        sum += select(exp2(s - top), 0.0, s <= NEVER);
    }
    wg_part[thread] = sum;
    workgroupBarrier();
    sum = select(0.0, exp2(sink_of(h) - top), sink_of(h) > NEVER);
    for (var n = 0u; n < THREADS{{ ROLL }}; n += 1u) { sum += wg_part[n]; }

    // A row with a key has sum >= 1, so the bound only keeps an empty row's division finite.
    let over = 1.0 / max(sum, 0.5);
    for (var j = thread; j < P.k_len; j += THREADS) {
        var p = 0.0;
        if (j >= first && j < last) {
            let s = weights[at + j];
            p = select(exp2(s - top) * over, 0.0, s <= NEVER);
        }
        weights[at + j] = p;
    }
{% if HAS_LSE %}
    if (thread == 0u) { lse[P.lse_from + row_number(b, h, i)] = lse_of(top, sum); }
{% endif %}
}
