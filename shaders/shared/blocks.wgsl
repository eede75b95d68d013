// Weights in blocks of 32 rows of W [K, N]: small integers in u32 words, a scale for each block and column.
//
//   q8_0  w [K / 4, N] words of 4 signed bytes; scales [K / 32, N] f16: d q
//   q4_0  w [K / 8, N] words of 8 signed nibbles; scales as above: d q
//   q4_1  w [K / 8, N] words of 8 nibbles; scales [K / 32, N] pairs of f16: d q + m
//
// Rows of words lie as rows of dense weights do, so threads next to each other read next to each other.
{% set PER_WORD = 4 if W_TYPE == "q8_0" else 8 %}
{% set BITS = 32 // PER_WORD %}

// Of the eight rows from a k on, the integers of row `e` of half `part` for four columns, a vec4<f32>: out of
// `words_0`, or a word for each half.
{% macro quants(part, e) -%}
{%- set words = "words_" ~ (part if PER_WORD == 4 else 0) -%}
{%- set e = e if PER_WORD == 4 else 4 * part + e -%}
{%- if W_TYPE == "q4_1" -%}
vec4<f32>(({{ words }} >> vec4<u32>({{ BITS * e }}u)) & vec4<u32>(15u))
{%- else -%}
vec4<f32>(bitcast<vec4<i32>>({{ words }} << vec4<u32>({{ 32 - BITS - BITS * e }}u)) >> vec4<u32>({{ 32 - BITS }}u))
{%- endif -%}
{%- endmacro %}

// Where the loop over a block's rows ends. A processor's driver is not to know, as it would unroll it.
{% set END = "min(first + 32u, P.k)" if SOFTWARE else "first + 32u" %}
