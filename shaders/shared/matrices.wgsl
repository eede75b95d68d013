// Products of cooperative matrices of M x M, f16 with f32 sums, by four subgroups of up to LANES threads, FIXED where
// they always have so many. PLAIN replaces the matrices by loops, the text around them being the same, so that it is
// tested where there are none. Before the include a kernel sets where matrices lie, workgroup arrays and the elements
// from one row (of A and C) or column (of B) to the next:
//
//   A   [array, stride], f16
//   B   {"name": [array, stride], ...}, f16, columns side by side, so that a thread loads 128 bits at once
//   C   [array, stride], f32
{% set THREADS = 4 * LANES %}
{# Whether there may be more subgroups than four. #}
{% set SPARE = not (FIXED or PLAIN) %}

{% if PLAIN %}
{# A lane has one row of A, held or where it lies, B where it lies, and of C the same row of some columns. #}
{% set SHARE = M * M // LANES %}
alias Row = array<f32, {{ M }}>;
alias Sum = array<f32, {{ SHARE }}>;
fn hold_a(at: u32, lane: u32) -> Row {
    let place = at + lane % {{ M }}u * {{ A[1] }};
    return Row({% for k in range(M) %}f32({{ A[0] }}[place + {{ k }}u]), {% endfor %});
}
{% for b, place in B|items %}
fn multiply_add_{{ b }}(a: u32, at: u32, sum: Sum, lane: u32) -> Sum {
    var c = sum;
    let row = a + lane % {{ M }}u * {{ A[1] }};
    let column = at + lane / {{ M }}u * {{ SHARE }}u * {{ place[1] }};
    for (var k = 0u; k < {{ M }}u{{ ROLL }}; k += 1u) {
        let x = f32({{ A[0] }}[row + k]);
{% for n in range(SHARE) %}
        c[{{ n }}] += x * f32({{ place[0] }}[column + {{ n }}u * {{ place[1] }} + k]);
{% endfor %}
    }
    return c;
}
fn multiply_add_held_{{ b }}(x: Row, at: u32, sum: Sum, lane: u32) -> Sum {
    var c = sum;
    let column = at + lane / {{ M }}u * {{ SHARE }}u * {{ place[1] }};
{% for k in range(M) %}
{% for n in range(SHARE) %}
    c[{{ n }}] += x[{{ k }}] * f32({{ place[0] }}[column + {{ n }}u * {{ place[1] }} + {{ k }}u]);
{% endfor %}
{% endfor %}
    return c;
}
{% endfor %}
fn place_of_c(at: u32, lane: u32) -> u32 {
    return at + lane % {{ M }}u * {{ C[1] }} + lane / {{ M }}u * {{ SHARE }}u;
}
fn load_c(at: u32, lane: u32) -> Sum {
    let place = place_of_c(at, lane);
    return Sum({% for n in range(SHARE) %}{{ C[0] }}[place + {{ n }}u], {% endfor %});
}
fn store_c(c: Sum, at: u32, lane: u32) {
    let to = place_of_c(at, lane);
{% for n in range(SHARE) %}
    {{ C[0] }}[to + {{ n }}u] = c[{{ n }}];
{% endfor %}
}
{% else %}
alias Sum = coop_mat{{ M }}x{{ M }}<f32, C>;
{% endif %}
{% macro load_a(at) %}
{%- if PLAIN %}{{ at }}{% else %}coopLoadT<coop_mat{{ M }}x{{ M }}<f16, A>>(&{{ A[0] }}[{{ at }}], {{ A[1] }}){% endif -%}
{% endmacro %}
{# A matrix that outlives what lies there, for multiply_add_held. #}
{% macro hold_a(at) %}
{%- if PLAIN %}hold_a({{ at }}, lane){% else %}{{ load_a(at) }}{% endif -%}
{% endmacro %}
{% macro load_b(b, at) %}
{%- if PLAIN %}{{ at }}{% else %}coopLoad<coop_mat{{ M }}x{{ M }}<f16, B>>(&{{ B[b][0] }}[{{ at }}], {{ B[b][1] }}){% endif -%}
{% endmacro %}
{% macro multiply_add(b, x, y, c) %}
{%- if PLAIN %}multiply_add_{{ b }}({{ x }}, {{ y }}, {{ c }}, lane){% else %}coopMultiplyAdd({{ x }}, {{ y }}, {{ c }}){% endif -%}
{% endmacro %}
{% macro multiply_add_held(b, x, y, c) %}
{{- multiply_add("held_" ~ b if PLAIN else b, x, y, c) -}}
{% endmacro %}
{% macro load_c(at) %}
{%- if PLAIN %}load_c({{ at }}, lane){% else %}coopLoadT<coop_mat{{ M }}x{{ M }}<f32, C>>(&{{ C[0] }}[{{ at }}], {{ C[1] }}){% endif -%}
{% endmacro %}
{% macro store_c(c, at) %}
{%- if PLAIN %}store_c({{ c }}, {{ at }}, lane);{% else %}coopStoreT({{ c }}, &{{ C[0] }}[{{ at }}], {{ C[1] }});{% endif -%}
{% endmacro %}

{# The number of this thread, and of the subgroup's share of rows. Where subgroups are smaller than they may be there
   are more than four: the others repeat the last one's products, and what is between owners() and end_owners() is
   not for them. #}
{% macro who() %}
    let thread = subgroup_id * lanes + lane_id;
{% if PLAIN %}
    let subgroup = thread / {{ LANES }}u;
    let lane = thread % {{ LANES }}u;
{% else %}
    let subgroup = subgroup_id;
{% endif %}
    let first_tile = {{ "min(subgroup, 3u)" if SPARE else "subgroup" }};
{% endmacro %}
{% macro owners() %}
{{- "loop { if (subgroup >= 4u) { break; }" if SPARE else "{" -}}
{% endmacro %}
{% macro end_owners() %}
{{- "break; }" if SPARE else "}" -}}
{% endmacro %}

{# Turn `turn` of sharing `count` items, `n`, among all threads; on a processor all turns in a loop. #}
{% macro turns_of(count) -%}
{{ 1 if SOFTWARE else (count + THREADS - 1) // THREADS }}
{%- endmacro %}
{% macro each_of(count, turn) -%}
{%- if SOFTWARE %}for (var n = thread; n < {{ count }}u; n += {{ THREADS }}u) {
{%- else -%}
{%- if (turn + 1) * THREADS > count %}if (thread < {{ count - turn * THREADS }}u) {% endif -%}{
            let n = thread + {{ turn * THREADS }}u;
{%- endif -%}
{%- endmacro %}
