// The activations of feed-forward layers, on four values. Include with ACTIVATION set.

fn activate(x: vec4<f32>) -> vec4<f32> {
{% if ACTIVATION == "none" %}
    return x;
{% elif ACTIVATION == "relu" %}
    return max(x, vec4<f32>());
{% elif ACTIVATION == "silu" %}
    return x / (1.0 + exp(-clamp(x, vec4<f32>(-80.0), vec4<f32>(80.0))));
{% elif ACTIVATION == "gelu_tanh" %}
    let inner = 0.7978845608028654 * (x + 0.044715 * x * x * x);
    return 0.5 * x * (1.0 + tanh(clamp(inner, vec4<f32>(-15.0), vec4<f32>(15.0))));
{% elif ACTIVATION == "gelu" %}
    // 0.5 x (1 + erf(x / sqrt 2)); erf by Abramowitz and Stegun 7.1.26's rational form is good to 1.5e-7.
    let z = abs(x) * 0.7071067811865476;
    let t = 1.0 / (1.0 + 0.3275911 * z);
    let series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
    let tail = series * exp(-min(z * z, vec4<f32>(80.0)));
    return 0.5 * x * (1.0 + sign(x) * (1.0 - tail));
{% endif %}
}
