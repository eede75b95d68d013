// The law of scores, in this order: scale, softcap, bias and ALiBi (and the caller's function), mask; sinks
// join the denominator at the end. Masks that are ranges of keys bound the loops; the others are asked for
// each element.

// Where query 0 of batch row `b` stands among its `length` keys; may be negative.
fn q_position(b: u32, length: u32) -> i32 {
{% if POSITION == "table" %}
    return clamp({{ table("q_offset", "b") }}, -0x20000000, 0x20000000);
{% elif POSITION == "top_left" %}
    return 0;
{% else %}
    return i32(length) - i32(q_count(b));
{% endif %}
}

// The keys that a query sees: begin .. end, and 0 .. prefix.
struct Keys { begin: u32, end: u32, prefix: u32 }

fn keys_of(b: u32, position: i32, length: u32) -> Keys {
    var keys = Keys(0u, length, 0u);
{% if HAS_RIGHT %}
    keys.end = u32(clamp(position + i32(P.right) + 1, 0, i32(length)));
{% endif %}
{% if HAS_LEFT %}
    keys.begin = u32(clamp(position - i32(P.left), 0, i32(length)));
{% endif %}
{% if HAS_PREFIX %}
    keys.prefix = min({{ table("prefix_len", "b") }}, length);
{% endif %}
    return keys;
}

// All that it sees lies in first_key .. last_key.
fn first_key(keys: Keys) -> u32 {
    return select(keys.begin, 0u, keys.prefix > 0u);
}
fn last_key(keys: Keys) -> u32 {
    return max(keys.end, keys.prefix);
}

// Of the steps of `size` keys from `j` on, the first that holds a key which rows from `low` on see: between the
// prefix and the window of `low` they see none.
fn first_step(low: Keys, j: u32, size: u32) -> u32 {
{% if HAS_LEFT %}
    return j + select(0u, (low.begin - j) / size, j >= low.prefix && j < low.begin) * size;
{% else %}
    return j;
{% endif %}
}
// The one after the step at `j`.
fn next_step(low: Keys, j: u32, size: u32) -> u32 {
{% if HAS_LEFT and HAS_PREFIX %}
    return first_step(low, j + size, size);
{% else %}
    return j + size;
{% endif %}
}

fn in_range(keys: Keys, j: u32) -> bool {
{% if HAS_PREFIX %}
    return (j >= keys.begin && j < keys.end) || j < keys.prefix;
{% elif HAS_LEFT %}
    return j >= keys.begin && j < keys.end;
{% else %}
    return j < keys.end;
{% endif %}
}

{% if HAS_T5 %}
// T5's relative position bucket (Raffel et al. 2020) of a key `distance` after the query.
fn t5_bucket(distance: i32) -> u32 {
{% if T5_BOTH %}
    let buckets = P.t5_buckets / 2u;
    let side = select(0u, buckets, distance > 0);
    let n = f32(abs(distance));
{% else %}
    let buckets = P.t5_buckets;
    let side = 0u;
    let n = f32(max(-distance, 0));
{% endif %}
    let exact = f32(buckets / 2u);
    let end = f32(buckets);
    // The small number makes up for the error of a device's logarithm, and of the sum, where the value is whole.
    let far = exact + log(max(n, exact) / exact) / P.t5_distance * (end - exact) + 2.0e-5;
    return side + u32(select(min(far, end - 1.0), n, n < exact));
}
{% endif %}

{% if HAS_BIAS %}
fn bias_of(b: u32, h: u32, i: u32, j: u32) -> f32 {
    let at = P.bias_from + b * P.bias_at.x + h * P.bias_at.y + i * P.bias_at.z + j * P.bias_at.w;
{% if BIAS_TYPE == "bf16" %}
    return bitcast<f32>(select(bias[at / 2u] << 16u, bias[at / 2u] & 0xffff0000u, at % 2u == 1u));
{% else %}
    return f32(bias[at]);
{% endif %}
}
{% endif %}

{{ FUNCTIONS }}

{% set LAW = HAS_SOFTCAP or HAS_BIAS or HAS_ALIBI or HAS_T5 or HAS_SCORE_MOD %}
{% set BY_ELEMENT = HAS_MASK or HAS_MASK_MOD %}
fn softcapped(x: f32) -> f32 {
{% if HAS_SOFTCAP %}
    // Near zero tanh(y) is y - y^3 / 3 + 2 y^5 / 15, better than most devices' tanh.
    let y = clamp(x / P.softcap, -15.0, 15.0);
    let z = y * y;
    let capped = P.softcap * select(tanh(y), y - y * z * (0.33333334 - 0.13333334 * z), z < 0.01);
    // clamp may make a number of NaN, which compilers need not see by comparing it.
    return select(capped, x, (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u);
{% else %}
    return x;
{% endif %}
}

// What follows the softcap: `position` is the query's.
fn biased(x: f32, b: u32, h: u32, i: u32, j: u32, position: i32) -> f32 {
    var s = x;
{% if HAS_BIAS %}
    // A bias of -inf masks whatever the score is, NaN included.
    let added = bias_of(b, h, i, j);
    if (added <= NEVER) { return NEVER; }
    s += added;
{% endif %}
{% if HAS_ALIBI %}
    s -= {{ table("alibi", "h") }} * f32(abs(position - i32(j)));
{% endif %}
{% if HAS_T5 %}
    s += {{ table("t5", "t5_bucket(i32(j) - position) * P.heads + h") }};
{% endif %}
{% if HAS_SCORE_MOD %}
    s = score_mod(s, b, h, i, j);
{% endif %}
    return s;
}

// Whether the mask lets query `i` attend to key `j`, which is in its range.
fn allowed(b: u32, h: u32, i: u32, j: u32) -> bool {
{% if HAS_MASK %}
    let at = P.mask_from + b * P.mask_at.x + h * P.mask_at.y + i * P.mask_at.z + j * P.mask_at.w;
    if (((mask[at / 4u] >> (at % 4u * 8u)) & 255u) == 0u) { return false; }
{% endif %}
{% if HAS_MASK_MOD %}
    if (!mask_mod(b, h, i, j)) { return false; }
{% endif %}
    return true;
}

// The score of an element times log2 e, from the plain product; NEVER where it is masked.
fn score(product: f32, keys: Keys, b: u32, h: u32, i: u32, j: u32, position: i32) -> f32 {
{% if LAW or BY_ELEMENT %}
    if (!in_range(keys, j)) { return NEVER; }
{% if BY_ELEMENT %}
    if (!allowed(b, h, i, j)) { return NEVER; }
{% endif %}
    let s = biased(softcapped(product * P.scale), b, h, i, j, position) * LOG2_E;
    // What a function calls -inf is masked; a NaN stays one.
    return select(s, NEVER, s < NEVER);
{% else %}
    return select(NEVER, product * (P.scale * LOG2_E), in_range(keys, j));
{% endif %}
}

// The sink of head `h` times log2 e; NEVER where there is none.
fn sink_of(h: u32) -> f32 {
{% if HAS_SINKS %}
    return select({{ table("sinks", "h") }} * LOG2_E, NEVER, {{ table("sinks", "h") }} < NEVER);
{% else %}
    return NEVER;
{% endif %}
}

// The natural logarithm of the denominator, 2^top * sum; NaN where that is.
fn lse_of(top: f32, sum: f32) -> f32 {
    return select((top + log2(sum)) * LN_2, P.minus_infinity, sum == 0.0);
}
