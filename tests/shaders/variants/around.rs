//! The kernels of everything around attention.

use qkv::gpu::{Matrices, Shader};

use super::{BOTH, Device, FLOATS, MATRICES, VECTORS};

/// The variants of a kernel for weights in blocks.
fn in_blocks(shader: &Shader, software: bool) -> impl Iterator<Item = Shader> {
    ["q8_0", "q4_0", "q4_1"].into_iter().map(move |w| {
        let shader = shader.clone().with("W_TYPE", w);
        shader.with("SOFTWARE", software)
    })
}

/// The variants of everything around attention.
pub fn other_variants() -> Vec<Shader> {
    let mut all = rest();
    // A processor with subgroups and without, then hardware with few rows and many.
    all.extend(products(&[1, 2, 4, 8], 1, true, true));
    all.extend(products(&[1, 2, 4], 1, true, false));
    all.extend(products(&[1, 2, 4], 8, true, false));
    all.extend(products(&[4, 8], 8, false, false));
    all.extend(MATRICES.into_iter().flat_map(products_of_matrices));
    all
}

/// Those of one device that is no processor.
pub fn others_of(device: Device) -> Vec<Shader> {
    let Device(subgroups, m, _) = device;
    let of_32 = subgroups.is_some_and(|(least, _)| least == 32);
    let mut all = rest();
    all.extend(products(&[1, 2, 4], 8, true, false));
    all.extend(products(&[if of_32 { 8 } else { 4 }], 8, false, false));
    if m > 0 {
        all.extend(products_of_matrices(device));
    }
    all
}

/// `matmul` with tiles of each of these rows.
fn products(rows: &[u32], slices: u32, split: bool, by_lanes: bool) -> Vec<Shader> {
    let mut all = Vec::new();
    let vectors = if by_lanes { &[1u32][..] } else { &VECTORS };
    for (&rows, &vec) in rows
        .iter()
        .flat_map(|rows| vectors.iter().map(move |vec| (rows, vec)))
    {
        for has_bias in BOTH {
            for has_residual in BOTH {
                for activation in ["none", "relu", "gelu", "gelu_tanh", "silu"] {
                    for [x, w, y] in [
                        ["f32"; 3],
                        ["f16"; 3],
                        ["f16", "f16", "f32"],
                        ["f32", "f16", "f32"],
                        ["f16", "f32", "f16"],
                        ["f16", "f32", "f32"],
                        ["f32", "blocks", "f32"],
                        ["f16", "blocks", "f16"],
                        ["f16", "blocks", "f32"],
                    ] {
                        for gated in BOTH {
                            let shader = Shader::new("matmul")
                                .with("F16", [x, w, y].contains(&"f16"))
                                .with("T", x)
                                .with("O_TYPE", y)
                                .with("VEC", vec)
                                .with("ROWS", rows)
                                .with("SLICES", slices)
                                .with("SPLIT", split)
                                .with("BY_LANES", by_lanes)
                                .with("HAS_BIAS", has_bias)
                                .with("HAS_RESIDUAL", has_residual)
                                .with("GATED", gated)
                                .with("ACTIVATION", activation);
                            if w != "blocks" {
                                all.push(shader.with("W_TYPE", w));
                            } else if vec == 4 || by_lanes {
                                all.extend(in_blocks(&shader, slices == 1));
                            }
                        }
                    }
                }
            }
        }
    }
    all
}

/// `matmul_coop`.
fn products_of_matrices(Device(subgroups, m, matrices): Device) -> Vec<Shader> {
    let mut all = Vec::new();
    let (least, most) = subgroups.unwrap();
    let plain = matrices == Matrices::Plain;
    for (y, gated) in FLOATS.iter().flat_map(|&y| BOTH.map(|gated| (y, gated))) {
        for (has_bias, has_residual) in BOTH.iter().flat_map(|&b| BOTH.map(|r| (b, r))) {
            for activation in ["none", "relu", "gelu", "gelu_tanh", "silu"] {
                let shader = Shader::new("matmul_coop")
                    .with("F16", true)
                    .with("T", "f16")
                    .with("O_TYPE", y)
                    .with("HAS_BIAS", has_bias)
                    .with("HAS_RESIDUAL", has_residual)
                    .with("GATED", gated)
                    .with("ACTIVATION", activation)
                    .with("M", m)
                    .with("LANES", if plain { 32 } else { most })
                    .with("FIXED", least == most)
                    .with("PLAIN", plain)
                    .with("SOFTWARE", plain)
                    .with("BY_LANES", false);
                let dense = shader.clone().with("W_TYPE", "f16");
                all.extend(VECTORS.map(|vec| dense.clone().with("VEC", vec)));
                if y == "f16" {
                    for storage in ["q8_0", "q4_0", "q4_1"] {
                        let shader = shader.clone().with("VEC", 4u32);
                        all.push(shader.with("W_TYPE", storage));
                    }
                }
            }
        }
    }
    all
}

/// What is neither attention nor a matrix product.
fn rest() -> Vec<Shader> {
    let mut all = Vec::new();
    for t in FLOATS {
        for rms in BOTH {
            for has_rows in BOTH {
                all.push(
                    Shader::new("norm")
                        .with("F16", t == "f16")
                        .with("T", t)
                        .with("RMS", rms)
                        .with("HAS_ROWS", has_rows),
                );
            }
        }
        let stored = ["f32", "f16", "bf16", "q8_0", "q4_0"];
        for [k, v] in stored.iter().flat_map(|&k| stored.map(|v| [k, v])) {
            for has_places in BOTH {
                for qk_norm in BOTH {
                    for (rotary, page) in ["none", "halves", "neighbours"]
                        .into_iter()
                        .flat_map(|rotary| [0u32, 5].map(|page| (rotary, page)))
                    {
                        all.push(
                            Shader::new("append")
                                .with("F16", [t, k, v].contains(&"f16"))
                                .with("T", t)
                                .with("K_TYPE", k)
                                .with("V_TYPE", v)
                                .with("HAS_PLACES", has_places)
                                .with("QK_NORM", qk_norm)
                                .with("ROTARY", rotary)
                                .with("PAGE", page)
                                .with("HEAD_DIM", 96u32),
                        );
                    }
                }
            }
        }
        for has_positions in BOTH {
            for has_lengths in BOTH {
                let embed = Shader::new("embed")
                    .with("T", t)
                    .with("HAS_POSITIONS", has_positions)
                    .with("HAS_LENGTHS", has_lengths);
                for w in FLOATS {
                    let f16 = [t, w].contains(&"f16");
                    all.push(embed.clone().with("F16", f16).with("W_TYPE", w));
                }
                all.extend(in_blocks(&embed.with("F16", t == "f16"), false));
            }
        }
    }
    for candidates in [1u32, 2, 8, 64] {
        for renormalize in [false, true] {
            let shader = Shader::new("choose").with("CANDIDATES", candidates);
            all.push(shader.with("RENORMALIZE", renormalize));
        }
    }
    all.push(Shader::new("copy_page"));
    for t in FLOATS {
        for work in ["multiply_adds", "read", "copy"] {
            let shader = Shader::new("limits").with("F16", t == "f16");
            all.push(shader.with("T", t).with("WORK", work));
        }
    }
    for top_k in BOTH {
        for top_p in BOTH {
            all.push(
                Shader::new("sample")
                    .with("TOP_K", top_k)
                    .with("TOP_P", top_p),
            );
        }
    }
    for beams in [2u32, 4, 32] {
        all.push(Shader::new("reorder").with("BEAMS", beams));
    }
    all
}
