// The law of scores: scale, then the mask. Masks are ranges: query i attends to keys 0 .. key_end(i).

fn kv_length(kb: u32) -> u32 {
{% if HAS_KV_LEN %}
    return min(kv_len[kb], P.k_len);
{% else %}
    return P.k_len;
{% endif %}
}

// One past the last key that query `i` sees among `length` keys. Query i stands at key position
// i + offset, the offset being 0 (top-left) or length - Q (bottom-right), which may be negative.
fn key_end(i: u32, length: u32) -> u32 {
{% if CAUSAL %}
{% if TOP_LEFT %}
    let offset = 0;
{% else %}
    let offset = i32(length) - i32(P.q_len);
{% endif %}
    return u32(clamp(i32(i) + offset + 1, 0, i32(length)));
{% else %}
    return length;
{% endif %}
}
