// Reading and writing rows of an attention tensor, four columns at a time. f16 is read as words, two numbers each,
// which GPUs do as well and processors at half the cost; bf16 is unpacked by its bits, q8_0 and q4_0 from pairs of
// blocks of 32: a word of two scales, then the quants of both.

// The element type of a tensor's binding that is read.
{% macro element(type, VEC) -%}
{%- if type in ["q8_0", "q4_0"] %}u32{% elif VEC == 4 %}{{ "vec4<f32>" if type == "f32" else "vec2<u32>" }}{% else %}{{ "u32" if type == "bf16" else type }}{% endif -%}
{%- endmacro %}

// What four numbers are that were read into the variable `x`.
{% macro floats(x, type) -%}
{%- if type == "f16" -%}
vec4<f32>(unpack2x16float({{ x }}.x), unpack2x16float({{ x }}.y))
{%- elif type == "bf16" -%}
bitcast<vec4<f32>>(vec4<u32>({{ x }}.x << 16u, {{ x }}.x & 0xffff0000u, {{ x }}.y << 16u, {{ x }}.y & 0xffff0000u))
{%- else -%}
{{ x }}
{%- endif -%}
{%- endmacro %}

// Four elements of a row that starts at element `at`, from column `d` on; zeros past the row's end, unless
// the kernel reads `inside` the row only.
{% macro row_loader(name, type, extent, column, VEC, inside=false) %}
fn load_{{ name }}(at: u32, d: u32) -> vec4<f32> {
{% if type in ["q8_0", "q4_0"] %}
{% if not inside %}
    if (d >= P.{{ extent }}) { return vec4<f32>(); }
{% endif %}
    let pair = at + d / 64u * {{ 17 if type == "q8_0" else 9 }}u;
    let scales = unpack2x16float({{ name }}[pair]);
{% if type == "q8_0" %}
    let quants = vec4<f32>(unpack4xI8({{ name }}[pair + 1u + d % 64u / 4u]));
{% else %}
    let word = {{ name }}[pair + 1u + d % 64u / 8u] >> (d % 8u * 4u);
    let quants = vec4<f32>((vec4<u32>(word) >> vec4<u32>(0u, 4u, 8u, 12u)) & vec4<u32>(15u)) - 8.0;
{% endif %}
    return select(scales.x, scales.y, d % 64u >= 32u) * quants;
{% elif VEC == 4 %}
{% if not inside %}
    if (d >= P.{{ extent }}) { return vec4<f32>(); }
{% endif %}
    let x = {{ name }}[(at + d) / 4u];
    return {{ floats("x", type) }};
{% else %}
    var x = vec4<f32>();
{% for e in range(4) %}
    if (d + {{ e }}u < P.{{ extent }}) { x[{{ e }}] = element_{{ name }}(at + (d + {{ e }}u) * P.columns.{{ column }}); }
{% endfor %}
    return x;
{% endif %}
}
{% if VEC != 4 and type not in ["q8_0", "q4_0"] %}
fn element_{{ name }}(at: u32) -> f32 {
{% if type == "bf16" %}
    let x = {{ name }}[at / 2u];
    return bitcast<f32>(select(x << 16u, x & 0xffff0000u, at % 2u == 1u));
{% else %}
    return f32({{ name }}[at]);
{% endif %}
}
{% endif %}
{% endmacro %}

// Writes four elements of an output row; those past its end are not there. Where bf16 pairs straddle rows,
// two threads may share a word, so each changes its own half by atomic operations.
{% macro row_writer(name, type, extent, VEC) %}
{% if type == "bf16" %}
// The nearest bf16, ties to even, in the upper half.
fn bf16_bits(x: vec4<f32>) -> vec4<u32> {
    let bits = bitcast<vec4<u32>>(x);
    let rounded = bits + vec4<u32>(0x7fffu) + ((bits >> vec4<u32>(16u)) & vec4<u32>(1u));
    // A NaN's payload must not be rounded away.
    let nan = (bits & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
    return select(rounded, vec4<u32>(0x7fc00000u), nan) & vec4<u32>(0xffff0000u);
}
{% endif %}
fn store_{{ name }}(at: u32, d: u32, x: vec4<f32>) {
{% if VEC == 4 and type == "bf16" %}
    let bits = bf16_bits(x);
    if (d < P.{{ extent }}) { {{ name }}[(at + d) / 4u] = vec2<u32>((bits.x >> 16u) | bits.y, (bits.z >> 16u) | bits.w); }
{% elif VEC == 4 %}
    if (d < P.{{ extent }}) { {{ name }}[(at + d) / 4u] = vec4<{{ type }}>(x); }
{% elif type == "bf16" %}
    let bits = bf16_bits(x);
{% for e in range(4) %}
    if (d + {{ e }}u < P.{{ extent }}) {
        let to = at + (d + {{ e }}u) * P.columns.w;
        let high = to % 2u == 1u;
        atomicAnd(&{{ name }}[to / 2u], select(0xffff0000u, 0x0000ffffu, high));
        atomicOr(&{{ name }}[to / 2u], select(bits[{{ e }}] >> 16u, bits[{{ e }}], high));
    }
{% endfor %}
{% else %}
{% for e in range(4) %}
    if (d + {{ e }}u < P.{{ extent }}) { {{ name }}[at + (d + {{ e }}u) * P.columns.w] = {{ type }}(x[{{ e }}]); }
{% endfor %}
{% endif %}
}
{% endmacro %}

// The element type of an output's binding.
{% macro out_element(type, VEC) -%}
{%- if type == "bf16" %}{{ "vec2<u32>" if VEC == 4 else "atomic<u32>" }}{% else %}{{ "vec4<" ~ type ~ ">" if VEC == 4 else type }}{% endif -%}
{%- endmacro %}
