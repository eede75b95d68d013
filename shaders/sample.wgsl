// sample: one token of each row, drawn from what its rules leave; moves the sequence on by one.
//
//   one workgroup a row; the warpers of Hugging Face transformers, in their order
//   1. repeat penalty: logits of tokens seen become x / penalty, or x * penalty below zero
//   2. temperature: x = (x - the greatest) / temperature, at most 0, and written back
//   3. top-k: the greatest k, and what equals the last of them
//   4. top-p: the fewest of the greatest whose probabilities reach p, and what equals the last of them
//   5. min-p: those at least p times as likely as the likeliest
//   6. a draw: the first token, by number, at which the kept ones' running sum exceeds u times their sum
//
// All of 3 to 5 keep what is not below some x. As x <= 0, bits without the sign order them: 3 and 4 search for
// the last that is kept, two bits at a time, by counts and by sums of exp x.
// u is a hash of the row's seed and its length (pcg4d; Jarzynski and Olano 2020): it knows no neighbour.
// Temperature 0 keeps the greatest and takes the first of them.
// A NaN logit is never drawn, and makes the log-probability of its row NaN, which the host reports.
struct Params { rows: u32, vocab: u32, seen_words: u32, pad: u32 }
struct Rules {
    seed: vec2<u32>, top_k: u32, temperature: f32,
    top_p: f32, least: f32, penalty: f32, pad: u32,                         // least: ln min_p
}
@group(0) @binding(0) var<uniform> P: Params;
@group(0) @binding(1) var<storage, read_write> logits: array<f32>;          // [R, V]; x, and DROPPED, afterwards
@group(0) @binding(2) var<storage, read> rules: array<Rules>;               // [R]
@group(0) @binding(3) var<storage, read_write> seen: array<u32>;            // [R, words]: a bit a token
@group(0) @binding(4) var<storage, read_write> lengths: array<u32>;         // [R]
@group(0) @binding(5) var<storage, read_write> chosen: array<u32>;          // [R, 2]: token, log-probability
@group(0) @binding(6) var<storage, read_write> ids: array<u32>;             // [R], the next step's input

const THREADS = 256u;
const DROPPED = -1.0e30;
// More than any sum of exponentials.
const SPOILT = 1.0e30;
const ALL = 0xffffffffu;
var<workgroup> wg_value: array<vec3<f32>, 256>;
var<workgroup> wg_part: array<vec3<f32>, 16>;
var<workgroup> wg_sum: array<f32, 256>;
var<workgroup> wg_draw: vec3<f32>;
var<workgroup> wg_owner: u32;

fn is_nan(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u; }

// How far x <= 0 is below 0, as an integer.
fn depth(x: f32) -> u32 { return bitcast<u32>(x) & 0x7fffffffu; }

fn pcg4d(key: vec4<u32>) -> u32 {
    var v = key * 1664525u + 1013904223u;
    v.x += v.y * v.w; v.y += v.z * v.x; v.z += v.x * v.y; v.w += v.y * v.z;
    v ^= v >> vec4<u32>(16u);
    v.x += v.y * v.w; v.y += v.z * v.x; v.z += v.x * v.y; v.w += v.y * v.z;
    return v.x;
}

// Over the workgroup: 16 threads take 16 values each, then every thread takes those 16.
fn sums(thread: u32, value: vec3<f32>) -> vec3<f32> {
    workgroupBarrier();
    wg_value[thread] = value;
    workgroupBarrier();
    if (thread < 16u) {
        var part = wg_value[thread * 16u];
        for (var n = 1u; n < 16u; n += 1u) { part += wg_value[thread * 16u + n]; }
        wg_part[thread] = part;
    }
    workgroupBarrier();
    var sum = wg_part[0];
    for (var n = 1u; n < 16u; n += 1u) { sum += wg_part[n]; }
    return sum;
}

fn greatest(thread: u32, value: vec3<f32>) -> vec3<f32> {
    workgroupBarrier();
    wg_value[thread] = value;
    workgroupBarrier();
    if (thread < 16u) {
        var part = wg_value[thread * 16u];
        for (var n = 1u; n < 16u; n += 1u) { part = max(part, wg_value[thread * 16u + n]); }
        wg_part[thread] = part;
    }
    workgroupBarrier();
    var top = wg_part[0];
    for (var n = 1u; n < 16u; n += 1u) { top = max(top, wg_part[n]); }
    return top;
}

{% for (name, measure) in [("by_count", "1.0"), ("by_mass", "exp(x)")] %}
// The least depth, at most `deepest`, down to which tokens reach `bound`; ALL where none do.
fn {{ name }}(thread: u32, at: u32, deepest: u32, bound: f32) -> u32 {
    var found = 0u;
    for (var digit = 0u; digit < 16u; digit += 1u) {
        let shift = 30u - 2u * digit;
        let ends = vec3<u32>(found) + (vec3<u32>(1u, 2u, 3u) << vec3<u32>(shift)) - vec3<u32>(1u);
        var part = vec3<f32>();
        for (var n = thread; n < P.vocab; n += THREADS) {
            let x = logits[at + n];
            let d = depth(x);
            if (d <= deepest && x > DROPPED) { part += select(vec3<f32>(), vec3<f32>({{ measure }}), vec3<u32>(d) <= ends); }
        }
        let reached = sums(thread, part);
        let short = select(vec3<u32>(), vec3<u32>(1u), reached < vec3<f32>(bound));
        found += (short.x + short.y + short.z) << shift;
    }
    return found;
}
{% endfor %}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = group.y * groups.x + group.x;
    if (row >= P.rows) { return; }
    let at = row * P.vocab;
    let rule = rules[row];
    let length = lengths[row];
    let greedy = rule.temperature == 0.0;

    // The model's own probabilities, for the score.
    var tops = vec3<f32>(DROPPED);
    for (var n = thread; n < P.vocab; n += THREADS) { tops.x = max(tops.x, logits[at + n]); }
    let own_top = greatest(thread, tops).x;
    var part = vec3<f32>();
    for (var n = thread; n < P.vocab; n += THREADS) {
        let x = logits[at + n];
        part.x += select(exp(max(x - own_top, -80.0)), SPOILT, is_nan(x));
    }
    let own_sum = sums(thread, part).x;

    tops = vec3<f32>(DROPPED);
    for (var n = thread; n < P.vocab; n += THREADS) {
        var x = logits[at + n];
        if (((seen[row * P.seen_words + n / 32u] >> (n % 32u)) & 1u) != 0u) {
            x = select(x / rule.penalty, x * rule.penalty, x < 0.0);
            logits[at + n] = x;
        }
        if (!is_nan(x)) { tops.x = max(tops.x, x); }
    }
    let top = greatest(thread, tops).x;
    let temperature = select(rule.temperature, 1.0, greedy);
    for (var n = thread; n < P.vocab; n += THREADS) {
        let x = logits[at + n];
        logits[at + n] = select(min((x - top) / temperature, 0.0), DROPPED, is_nan(x));
    }

    var deepest = select(ALL, 0u, greedy);
{% if TOP_K %}
    let wanted = select(f32(min(rule.top_k, P.vocab)), 1.0e9, rule.top_k == 0u);
    deepest = min(deepest, by_count(thread, at, ALL, wanted));
{% endif %}
{% if TOP_P %}
    part = vec3<f32>();
    for (var n = thread; n < P.vocab; n += THREADS) {
        let x = logits[at + n];
        if (depth(x) <= deepest) { part.x += exp(x); }
    }
    let mass = sums(thread, part).x;
    let bound = select(rule.top_p * mass, SPOILT, rule.top_p >= 1.0);
    deepest = min(deepest, by_mass(thread, at, deepest, bound));
{% endif %}
    for (var n = thread; n < P.vocab; n += THREADS) {
        let x = logits[at + n];
        if (depth(x) > deepest || x < rule.least) { logits[at + n] = DROPPED; }
    }
    storageBarrier();
    workgroupBarrier();

    // Each thread sums tokens that lie together, so that one of them has the drawn one.
    let span = (P.vocab + THREADS - 1u) / THREADS;
    let first = min(thread * span, P.vocab);
    let end = min(first + span, P.vocab);
    var own = 0.0;
    for (var n = first; n < end; n += 1u) {
        let x = logits[at + n];
        if (x > DROPPED) { own += exp(x); }
    }
    wg_sum[thread] = own;
    workgroupBarrier();
    if (thread == 0u) {
        var all = 0.0;
        for (var n = 0u; n < THREADS; n += 1u) { all += wg_sum[n]; }
        let bits = pcg4d(vec4<u32>(rule.seed, length, 0u));
        let goal = select(f32(bits >> 8u) * 5.9604644775390625e-8 * all, 0.0, greedy);
        var owner = 0u;
        var before = 0.0;
        var sum = 0.0;
        for (var n = 0u; n < THREADS; n += 1u) {
            if (wg_sum[n] > 0.0 && sum <= goal) {
                owner = n;
                before = sum;
            }
            sum += wg_sum[n];
        }
        wg_draw = vec3<f32>(before, goal, 0.0);
        wg_owner = owner;
    }
    workgroupBarrier();
    if (thread == wg_owner) {
        var sum = wg_draw.x;
        var token = P.vocab;
        var open = true;
        for (var n = first; n < end; n += 1u) {
            let x = logits[at + n];
            if (open && x > DROPPED) {
                sum += exp(x);
                token = n;
                open = sum <= wg_draw.y;
            }
        }
        token = min(token, P.vocab - 1u);
        // The logit itself: x of the warpers times temperature plus the top, before the penalty.
        let word = row * P.seen_words + token / 32u;
        let bit = 1u << (token % 32u);
        var logit = logits[at + token] * temperature + top;
        if ((seen[word] & bit) != 0u) { logit = select(logit * rule.penalty, logit / rule.penalty, logit < 0.0); }
        chosen[2u * row] = token;
        chosen[2u * row + 1u] = select(bitcast<u32>(logit - own_top - log(own_sum)), 0x7fc00000u, own_sum >= SPOILT);
        seen[word] |= bit;
        ids[row] = token;
        lengths[row] = length + 1u;
    }
}
