// Reading and writing rows of an attention tensor, four columns at a time.

// Four elements of a row that starts at element `at`, from column `d` on; zeros past the row's end.
{% macro row_loader(name, extent, VEC) %}
fn load_{{ name }}(at: u32, d: u32) -> vec4<f32> {
{% if VEC == 4 %}
    if (d >= P.{{ extent }}) { return vec4<f32>(); }
    return vec4<f32>({{ name }}[(at + d) / 4u]);
{% else %}
    var x = vec4<f32>();
    if (d < P.{{ extent }}) { x.x = f32({{ name }}[at + d]); }
    if (d + 1u < P.{{ extent }}) { x.y = f32({{ name }}[at + d + 1u]); }
    if (d + 2u < P.{{ extent }}) { x.z = f32({{ name }}[at + d + 2u]); }
    if (d + 3u < P.{{ extent }}) { x.w = f32({{ name }}[at + d + 3u]); }
    return x;
{% endif %}
}
{% endmacro %}

// Writes four elements of an output row; those past its end are not there.
{% macro row_writer(name, element, extent, VEC) %}
fn store_{{ name }}(at: u32, d: u32, x: vec4<f32>) {
{% if VEC == 4 %}
    if (d < P.{{ extent }}) { {{ name }}[(at + d) / 4u] = vec4<{{ element }}>(x); }
{% else %}
    if (d < P.{{ extent }}) { {{ name }}[at + d] = {{ element }}(x.x); }
    if (d + 1u < P.{{ extent }}) { {{ name }}[at + d + 1u] = {{ element }}(x.y); }
    if (d + 2u < P.{{ extent }}) { {{ name }}[at + d + 2u] = {{ element }}(x.z); }
    if (d + 3u < P.{{ extent }}) { {{ name }}[at + d + 3u] = {{ element }}(x.w); }
{% endif %}
}
{% endmacro %}
