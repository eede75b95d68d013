// softmax: W[b, h, i, :] = exp(W - max) / sum, in place, the second of the three passes.
//
//   one workgroup a row; a row that sees no key becomes zeros
{% set buffers = [["weights", "read_write", "f32"]] %}
{% include "shared/problem.wgsl" %}
{% include "shared/score.wgsl" %}

const THREADS = 64u;
var<workgroup> partial: array<f32, 64>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = workgroup_index(group, groups);
    if (row >= P.batch * P.heads * P.q_len) { return; }
    let i = row % P.q_len;
    let b = row / (P.q_len * P.heads);
    let end = key_end(i, kv_length(kv_row(b)));
    let at = row * P.k_len;

    var top = NEVER;
    for (var j = thread; j < end; j += THREADS) { top = max(top, weights[at + j]); }
    partial[thread] = top;
    workgroupBarrier();
    for (var n = 0u; n < THREADS; n += 1u) { top = max(top, partial[n]); }
    workgroupBarrier();

    var sum = 0.0;
    for (var j = thread; j < end; j += THREADS) { sum += exp2((weights[at + j] - top) * LOG2_E); }
    partial[thread] = sum;
    workgroupBarrier();
    sum = 0.0;
    for (var n = 0u; n < THREADS; n += 1u) { sum += partial[n]; }

    // A row with a key has sum >= 1, so the bound only keeps an empty row's division finite.
    let over = 1.0 / max(sum, 0.5);
    for (var j = thread; j < P.k_len; j += THREADS) {
        var p = 0.0;
        if (j < end) { p = exp2((weights[at + j] - top) * LOG2_E) * over; }
        weights[at + j] = p;
    }
}
