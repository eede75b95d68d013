// append: a step's keys and values into the cache, and its queries made ready to attend.
//
//   a workgroup takes one head of one row of qkv [R, (H + 2 Hk) D] into workgroup memory
//     queries and keys: [x = x / sqrt(mean x^2 + eps) * gamma], [pairs of columns turned by position * turns]
//     queries -> q [R, H D]; keys and values -> k_cache, v_cache [S, Hk, L, D], each in its own type, or to the
//     pages [N, Hk, PAGE, D] that a table names for each sequence
//   without norm and turning the queries stay where they are, and `first` is the first head of the keys
//
// Angles are counted in turns, in fixed point: 44 bits behind the point, of which whole turns fall off by
// themselves. So no position is too far for f32, and no device's own sine is asked for more than it promises
// (WebGPU allows an error of 2^-11, and any error outside -pi .. pi).
{% if F16 %}
enable f16;
{% endif %}
struct Params {
    rows: u32, heads: u32, kv_heads: u32, first: u32,
    sequences: u32, capacity: u32, rotary: u32, attention_factor: f32,
    eps: f32, pool: u32, pad_0: u32, pad_1: u32,
}
@group(0) @binding(0) var<uniform> P: Params;
@group(0) @binding(1) var<storage, read> qkv: array<{{ T }}>;
{% if HAS_PLACES %}
@group(0) @binding(2) var<storage, read> places: array<vec2<u32>>;          // [R]: sequence, position
{% else %}
@group(0) @binding(2) var<storage, read> lengths: array<u32>;               // [R], this token included
{% endif %}
{% set words = ["bf16", "q8_0", "q4_0"] %}
{% set BLOCKS = K_TYPE in ["q8_0", "q4_0"] or V_TYPE in ["q8_0", "q4_0"] %}
@group(0) @binding(3) var<storage, read_write> k_cache: array<{{ "u32" if K_TYPE in words else K_TYPE }}>;
@group(0) @binding(4) var<storage, read_write> v_cache: array<{{ "u32" if V_TYPE in words else V_TYPE }}>;
{% set optional = (["read_write> q: array<" ~ T ~ ">"] if QK_NORM or ROTARY != "none" else [])
    + (["read> turns: array<vec2<u32>>"] if ROTARY != "none" else [])
    + (["read> gamma: array<f32>"] if QK_NORM else [])
    + (["read> pages: array<u32>"] if PAGE else []) %}
{% for declaration in optional %}
@group(0) @binding({{ 4 + loop.index }}) var<storage, {{ declaration }};
{% endfor %}

const THREADS = 64u;
const HEAD_DIM = {{ HEAD_DIM }}u;
var<workgroup> wg_x: array<f32, {{ HEAD_DIM }}>;
var<workgroup> wg_square: array<f32, 64>;
{% if BLOCKS %}
var<workgroup> wg_y: array<f32, {{ HEAD_DIM }}>;   // what is stored in blocks
{% endif %}

// The number of the row that holds the head of a position: all that is known here of a cache's layout.
fn cell(sequence: u32, head: u32, position: u32) -> u32 {
{% if PAGE %}
    let page = pages[sequence * (P.capacity / {{ PAGE }}u) + position / {{ PAGE }}u];
    return (page * P.kv_heads + head) * {{ PAGE }}u + position % {{ PAGE }}u;
{% else %}
    return (sequence * P.kv_heads + head) * P.capacity + position;
{% endif %}
}

{% if ROTARY != "none" %}
// Cosine and sine of the angle of a pair of columns, good to 1e-7.
fn cos_sin(position: u32, pair: u32) -> vec2<f32> {
    let step = turns[pair];
    let phase = position * step.x + ((position * step.y) >> 12u);
    // The nearest quarter, and what is left of it: within an eighth of a turn either way.
    let quarter = (phase + 0x20000000u) >> 30u;
    let x = f32(bitcast<i32>(phase - (quarter << 30u))) * 1.4629180792671596e-9;
    let y = x * x;
    let sine = x * (1.0 + y * (-1.0 / 6.0 + y * (1.0 / 120.0 + y * (-1.0 / 5040.0 + y * (1.0 / 362880.0)))));
    let cosine = 1.0 + y * (-0.5 + y * (1.0 / 24.0 + y * (-1.0 / 720.0 + y * (1.0 / 40320.0))));
    let swapped = select(vec2<f32>(cosine, sine), vec2<f32>(-sine, cosine), (quarter & 1u) == 1u);
    return P.attention_factor * select(swapped, -swapped, quarter >= 2u);
}

// Column `c` of the head in workgroup memory, turned with its partner.
fn turned(c: u32, position: u32) -> f32 {
    if (c >= P.rotary) { return wg_x[c]; }
{% if ROTARY == "halves" %}
    let half = P.rotary / 2u;
    let pair = c % half;
    let second = c >= half;
    let a = wg_x[pair];
    let b = wg_x[pair + half];
{% else %}
    let pair = c / 2u;
    let second = c % 2u == 1u;
    let a = wg_x[2u * pair];
    let b = wg_x[2u * pair + 1u];
{% endif %}
    let angle = cos_sin(position, pair);
    return select(a * angle.x - b * angle.y, b * angle.x + a * angle.y, second);
}
{% endif %}

fn bf16_bits(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let rounded = (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
    // A NaN's payload must not be rounded away.
    return select(rounded, 0x7fc0u, (bits & 0x7fffffffu) > 0x7f800000u);
}

{% if BLOCKS %}
// The value of largest magnitude in a block of 32 columns.
fn largest(block: u32) -> f32 {
    var most = 0.0;
    for (var c = block * 32u; c < block * 32u + 32u; c += 1u) {
        most = select(most, wg_y[c], abs(wg_y[c]) > abs(most));
    }
    return most;
}

// The scale of a block, as src/gpu/blocks.rs has it.
fn q8_0_scale(block: u32) -> f32 {
    return abs(largest(block)) / 127.0;
}
fn q4_0_scale(block: u32) -> f32 {
    return largest(block) / -8.0;
}

// Word `n` of a row in pairs of blocks.
{% for type, per_word, bits, least, most, zero in [("q8_0", 4, 8, -127.0, 127.0, 0.0), ("q4_0", 8, 4, 0.0, 15.0, 8.0)] %}
fn {{ type }}_word(n: u32) -> u32 {
    let pair = n / {{ 64 // per_word + 1 }}u;
    let word = n % {{ 64 // per_word + 1 }}u;
    if (word == 0u) {
        var second = 0.0;
        if (pair * 64u + 32u < HEAD_DIM) { second = {{ type }}_scale(pair * 2u + 1u); }
        return pack2x16float(vec2<f32>({{ type }}_scale(pair * 2u), second));
    }
    let from_c = pair * 64u + (word - 1u) * {{ per_word }}u;
    let scale = {{ type }}_scale(from_c / 32u);
    let over = select(1.0 / scale, 0.0, scale == 0.0);
    var result = 0u;
    for (var c = 0u; c < {{ per_word }}u; c += 1u) {
        let quant = i32(clamp(round(wg_y[from_c + c] * over) + {{ zero }}, {{ least }}, {{ most }}));
        result |= (bitcast<u32>(quant) & {{ 2 ** bits - 1 }}u) << (c * {{ bits }}u);
    }
    return result;
}
{% endfor %}
{% endif %}

// The head in workgroup memory to row `at` of a cache; a word of two bf16 has one writer, as D is even.
{% macro write(name, type, value) %}
{% if type in ["q8_0", "q4_0"] %}
{% set row_words = (HEAD_DIM // 32) * (8 if type == "q8_0" else 4) + (HEAD_DIM + 32) // 64 %}
        for (var n = thread; n < {{ row_words }}u; n += THREADS) { {{ name }}[at * {{ row_words }}u + n] = {{ type }}_word(n); }
{% elif type == "bf16" %}
        for (var c = 2u * thread; c < HEAD_DIM; c += 2u * THREADS) {
            let low = bf16_bits({{ value[0] }}c{{ value[1] }});
            {{ name }}[(at * HEAD_DIM + c) / 2u] = low | (bf16_bits({{ value[0] }}c + 1u{{ value[1] }}) << 16u);
        }
{% else %}
        for (var c = thread; c < HEAD_DIM; c += THREADS) { {{ name }}[at * HEAD_DIM + c] = {{ type }}({{ value[0] }}c{{ value[1] }}); }
{% endif %}
{% endmacro %}
{% set plain = ["wg_x[", "]"] %}
{% set turned = plain if ROTARY == "none" else ["turned(", ", position)"] %}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let all = P.heads + 2u * P.kv_heads;
    let taken = all - P.first;
    let index = group.y * groups.x + group.x;
    if (index >= P.rows * taken) { return; }
    let row = index / taken;
    let head = P.first + index % taken;
    let from_at = (row * all + head) * HEAD_DIM;
{% if HAS_PLACES %}
    let sequence = places[row].x;
    let position = places[row].y;
{% else %}
    let sequence = row;
    let position = lengths[row] - 1u;
{% endif %}

    var square = 0.0;
    for (var c = thread; c < HEAD_DIM; c += THREADS) {
        let x = f32(qkv[from_at + c]);
        wg_x[c] = x;
        square += x * x;
    }
{% if QK_NORM %}
    wg_square[thread] = square;
    workgroupBarrier();
    if (head < P.heads + P.kv_heads) {
        square = 0.0;
        for (var n = 0u; n < THREADS; n += 1u) { square += wg_square[n]; }
        let over = inverseSqrt(square / f32(HEAD_DIM) + P.eps);
        // The queries' row of gamma, then the keys'.
        let gamma_at = select(0u, HEAD_DIM, head >= P.heads);
        for (var c = thread; c < HEAD_DIM; c += THREADS) { wg_x[c] *= over * gamma[gamma_at + c]; }
    }
{% endif %}
    workgroupBarrier();

{% if BLOCKS %}
    let is_value = head >= P.heads + P.kv_heads;
    for (var c = thread; c < HEAD_DIM; c += THREADS) {
        wg_y[c] = {{ "wg_x[c]" if ROTARY == "none" else "select(turned(c, position), wg_x[c], is_value)" }};
    }
    workgroupBarrier();
{% endif %}
{% if QK_NORM or ROTARY != "none" %}
    if (head < P.heads) {
        let at = (row * P.heads + head) * HEAD_DIM;
        for (var c = thread; c < HEAD_DIM; c += THREADS) { q[at + c] = {{ T }}({{ turned[0] }}c{{ turned[1] }}); }
        return;
    }
{% endif %}
    // A row of padding has no place.
    if (sequence >= P.sequences || position >= P.capacity) { return; }
{% if PAGE %}
    if (pages[sequence * (P.capacity / {{ PAGE }}u) + position / {{ PAGE }}u] >= P.pool) { return; }
{% endif %}
    if (head < P.heads + P.kv_heads) {
        let at = cell(sequence, head - P.heads, position);
{{ write("k_cache", K_TYPE, turned) }}    } else {
        let at = cell(sequence, head - P.heads - P.kv_heads, position);
{{ write("v_cache", V_TYPE, plain) }}    }
}
