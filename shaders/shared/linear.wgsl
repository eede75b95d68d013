// What the matrix products share: Y [M, N] = activate(X [M, K] W [K, N] + bias) + residual. W's rows are
// padded to whole vec4s. X's rows are read as vec4s where K allows. GATED: W's columns come in pairs, a gate and
// what it lets through, and Y [M, N / 2] = activate(gate) * other + residual.
{% from "shared/rows.wgsl" import element, floats %}
{% set BLOCKS = W_TYPE in ["q8_0", "q4_0", "q4_1"] %}
{% if F16 %}
enable f16;
{% endif %}
struct Params { m: u32, n: u32, k: u32, w_stride: u32 }
@group(0) @binding(0) var<uniform> P: Params;
@group(0) @binding(1) var<storage, read> x: array<{{ element(T, VEC) }}>;
@group(0) @binding(2) var<storage, read> w: array<{{ "vec4<u32>" if BLOCKS else element(W_TYPE, 4) }}>;
@group(0) @binding(3) var<storage, read_write> y: array<{{ O_TYPE }}>;
{% set optional = (["scales: array<" ~ ("vec4<u32>" if W_TYPE == "q4_1" else "vec2<u32>") ~ ">"] if BLOCKS else [])
    + (["bias: array<f32>"] if HAS_BIAS else []) + (["residual: array<" ~ T ~ ">"] if HAS_RESIDUAL else []) %}
{% for declaration in optional %}
@group(0) @binding({{ 3 + loop.index }}) var<storage, read> {{ declaration }};
{% endfor %}

{% include "shared/activation.wgsl" %}

{% if BY_LANES %}
// Element `k` of row `row` of X; zero past its end.
fn load_x_element(row: u32, k: u32) -> f32 {
    if (k < P.k) { return f32(x[row * P.k + k]); }
    return 0.0;
}
{% endif %}

// Four elements of row `row` of X from column `k` on; zeros past its end.
fn load_x(row: u32, k: u32) -> vec4<f32> {
{% if VEC == 4 %}
    let four = x[(row * P.k + k) / 4u];
    return {{ floats("four", T) }};
{% else %}
    var value = vec4<f32>();
    let at = row * P.k + k;
    if (k < P.k) { value.x = f32(x[at]); }
    if (k + 1u < P.k) { value.y = f32(x[at + 1u]); }
    if (k + 2u < P.k) { value.z = f32(x[at + 2u]); }
    if (k + 3u < P.k) { value.w = f32(x[at + 3u]); }
    return value;
{% endif %}
}

{% if BLOCKS %}
{% include "shared/blocks.wgsl" %}

// The scales of a block of rows at the quad of columns `quad`.
{% if W_TYPE == "q4_1" %}
struct Scales { d: vec4<f32>, m: vec4<f32> }
fn load_scales(block: u32, quad: u32) -> Scales {
    let pairs = scales[block * (P.w_stride / 4u) + quad];
    let x = unpack2x16float(pairs.x);
    let y = unpack2x16float(pairs.y);
    let z = unpack2x16float(pairs.z);
    let w = unpack2x16float(pairs.w);
    return Scales(vec4<f32>(x.x, y.x, z.x, w.x), vec4<f32>(x.y, y.y, z.y, w.y));
}
{% else %}
struct Scales { d: vec4<f32> }
fn load_scales(block: u32, quad: u32) -> Scales {
    let pairs = scales[block * (P.w_stride / 4u) + quad];
    return Scales(vec4<f32>(unpack2x16float(pairs.x), unpack2x16float(pairs.y)));
}
{% endif %}
{% else %}
// Row `k` of W at the quad of columns `quad`; rows past the end repeat the last, where X is zero.
fn load_w(k: u32, quad: u32) -> vec4<f32> {
    let four = w[{{ "k" if VEC == 4 else "min(k, P.k - 1u)" }} * (P.w_stride / 4u) + quad];
    return {{ floats("four", W_TYPE) }};
}
{% endif %}

fn store_y(row: u32, quad: u32, sum: vec4<f32>) {
    let n = quad * 4u;
    var value = sum;
{% if HAS_BIAS %}
    value += vec4<f32>(bias[n], bias[n + 1u], bias[n + 2u], bias[n + 3u]);
{% endif %}
{% if GATED %}
    let gate = activate(value);
    let at = (row * P.n + n) / 2u;
{% for e in range(2) %}
    if (n + {{ 2 * e }}u < P.n) { y[at + {{ e }}u] = {{ O_TYPE }}(gate[{{ 2 * e }}] * value[{{ 2 * e + 1 }}]{% if HAS_RESIDUAL %} + f32(residual[at + {{ e }}u]){% endif %}); }
{% endfor %}
{% else %}
    value = activate(value);
    let at = row * P.n + n;
{% for e in range(4) %}
    if (n + {{ e }}u < P.n) { y[at + {{ e }}u] = {{ O_TYPE }}(value[{{ e }}]{% if HAS_RESIDUAL %} + f32(residual[at + {{ e }}u]){% endif %}); }
{% endfor %}
{% endif %}
}
