// choose: the most likely tokens of each row and their log-probabilities; moves the sequence on by one.
//
//   one workgroup a row
//   lse = log sum exp(logits), over the whole vocabulary or what is allowed of it
//   for n in 0 .. CANDIDATES: the greatest allowed logit below the last one found, in the order
//     (logit falling, token rising), so that ties go to the lower token and nothing is written over
//   greedy: the first one is the next step's input
//
// A NaN logit is never chosen, and makes the log-probabilities of its row NaN, which the host reports.
struct Params { rows: u32, vocab: u32, mask_words: u32, pad: u32 }
@group(0) @binding(0) var<uniform> P: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;                // [R, V]
@group(0) @binding(2) var<storage, read> allowed: array<u32>;               // [2, words]: first token, later ones
@group(0) @binding(3) var<storage, read_write> lengths: array<u32>;         // [R]
@group(0) @binding(4) var<storage, read_write> chosen: array<u32>;          // [R, CANDIDATES, 2]: token, log-probability
@group(0) @binding(5) var<storage, read_write> ids: array<u32>;             // [R], the next step's input

const THREADS = 256u;
const NEVER = -1.0e30;
// More than any sum of exponentials.
const SPOILT = 1.0e30;
var<workgroup> wg_value: array<f32, 256>;
var<workgroup> wg_token: array<u32, 256>;
var<workgroup> wg_part_value: array<f32, 16>;
var<workgroup> wg_part_token: array<u32, 16>;

// Reduces `name` over the workgroup: 16 threads take 16 values each, then every thread takes those 16.
{% macro reduce(name, operation) %}
    wg_value[thread] = {{ name }};
    workgroupBarrier();
    if (thread < 16u) {
        var part = wg_value[thread * 16u];
        for (var n = 1u; n < 16u; n += 1u) { part = {{ operation[0] }}part{{ operation[1] }}wg_value[thread * 16u + n]{{ operation[2] }}; }
        wg_part_value[thread] = part;
    }
    workgroupBarrier();
    {{ name }} = wg_part_value[0];
    for (var n = 1u; n < 16u; n += 1u) { {{ name }} = {{ operation[0] }}{{ name }}{{ operation[1] }}wg_part_value[n]{{ operation[2] }}; }
{% endmacro %}

fn is_open(mask_at: u32, token: u32) -> bool {
    return ((allowed[mask_at + token / 32u] >> (token % 32u)) & 1u) != 0u;
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = group.y * groups.x + group.x;
    if (row >= P.rows) { return; }
    let at = row * P.vocab;
    let length = lengths[row];
    let mask_at = select(P.mask_words, 0u, length == 1u);

    var top = NEVER;
    for (var n = thread; n < P.vocab; n += THREADS) {
{% if RENORMALIZE %}
        if (is_open(mask_at, n)) { top = max(top, logits[at + n]); }
{% else %}
        top = max(top, logits[at + n]);
{% endif %}
    }
{{ reduce("top", ["max(", ", ", ")"]) }}    var sum = 0.0;
    for (var n = thread; n < P.vocab; n += THREADS) {
        let x = logits[at + n];
        var part = exp(max(x - top, -80.0));
{% if RENORMALIZE %}
        if (!is_open(mask_at, n)) { part = 0.0; }
{% endif %}
        // NaN, told by its bits: comparisons cannot be trusted with it.
        if ((bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u) { part = SPOILT; }
        sum += part;
    }
{{ reduce("sum", ["", " + ", ""]) }}    let lse = top + log(sum);

    var last_value = -NEVER;
    var last_token = 0u;
    for (var candidate = 0u; candidate < {{ CANDIDATES }}u; candidate += 1u) {
        var value = NEVER;
        var token = P.vocab;
        for (var n = thread; n < P.vocab; n += THREADS) {
            let x = logits[at + n];
            let open = is_open(mask_at, n);
            let below = x < last_value || (x == last_value && n > last_token);
            if (open && below && (x > value || (x == value && n < token))) {
                value = x;
                token = n;
            }
        }
        wg_value[thread] = value;
        wg_token[thread] = token;
        workgroupBarrier();
        if (thread < 16u) {
            for (var n = thread * 16u; n < thread * 16u + 16u; n += 1u) {
                if (wg_value[n] > value || (wg_value[n] == value && wg_token[n] < token)) {
                    value = wg_value[n];
                    token = wg_token[n];
                }
            }
            wg_part_value[thread] = value;
            wg_part_token[thread] = token;
        }
        workgroupBarrier();
        for (var n = 0u; n < 16u; n += 1u) {
            if (wg_part_value[n] > value || (wg_part_value[n] == value && wg_part_token[n] < token)) {
                value = wg_part_value[n];
                token = wg_part_token[n];
            }
        }
        if (thread == 0u) {
            let slot = (row * {{ CANDIDATES }}u + candidate) * 2u;
            chosen[slot] = token;
            chosen[slot + 1u] = select(bitcast<u32>(value - lse), 0x7fc00000u, sum >= SPOILT);
            if (candidate == 0u) { ids[row] = min(token, P.vocab - 1u); }
        }
        last_value = value;
        last_token = token;
    }
    if (thread == 0u) { lengths[row] = length + 1u; }
}
