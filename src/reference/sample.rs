//! The oracle of sampling: the warpers of Hugging Face transformers in f64, and the draw.

/// What a row's next token is drawn by.
#[derive(Clone, Copy, Debug)]
pub struct Warpers {
    /// 1 for none.
    pub repeat_penalty: f64,
    /// Above 0.
    pub temperature: f64,
    /// 0 for all.
    pub top_k: usize,
    /// 1 for all.
    pub top_p: f64,
    /// 0 for all.
    pub min_p: f64,
}

/// Probabilities of the tokens that are left; tokens of equal logits stay or go together. `seen` tokens are
/// penalised once each.
pub fn warp(logits: &[f64], seen: &[usize], warpers: &Warpers) -> Vec<f64> {
    let mut x = logits.to_vec();
    let mut seen = seen.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for token in seen {
        x[token] = match x[token] < 0.0 {
            true => x[token] * warpers.repeat_penalty,
            false => x[token] / warpers.repeat_penalty,
        };
    }
    x.iter_mut().for_each(|x| *x /= warpers.temperature);
    let mut falling: Vec<usize> = (0..x.len()).collect();
    falling.sort_by(|&a, &b| x[b].total_cmp(&x[a]));
    if warpers.top_k > 0 && warpers.top_k < x.len() {
        let last = x[falling[warpers.top_k - 1]];
        falling.retain(|&token| x[token] >= last);
    }
    let softmax = |x: &[f64], tokens: &[usize]| {
        let top = x[tokens[0]];
        let mut p = vec![0.0; x.len()];
        let sum: f64 = tokens.iter().map(|&token| (x[token] - top).exp()).sum();
        tokens
            .iter()
            .for_each(|&token| p[token] = (x[token] - top).exp() / sum);
        p
    };
    if warpers.top_p < 1.0 {
        let p = softmax(&x, &falling);
        let mut before = 0.0;
        let mut last = x[falling[0]];
        for &token in &falling {
            if before < warpers.top_p {
                last = x[token];
            }
            before += p[token];
        }
        falling.retain(|&token| x[token] >= last);
    }
    if warpers.min_p > 0.0 {
        let p = softmax(&x, &falling);
        let least = warpers.min_p * p[falling[0]];
        falling.retain(|&token| p[token] >= least);
    }
    softmax(&x, &falling)
}

/// A number in 0 .. 1 by a seed and the length of a text, in steps of 2^-24: pcg4d (Jarzynski and Olano 2020,
/// Hash Functions for GPU Rendering) of the seed's halves, the length and 0.
pub fn uniform(seed: u64, length: u32) -> f64 {
    let mut v = [seed as u32, (seed >> 32) as u32, length, 0]
        .map(|x: u32| x.wrapping_mul(1664525).wrapping_add(1013904223));
    let round = |v: &mut [u32; 4]| {
        for [to, a, b] in [[0, 1, 3], [1, 2, 0], [2, 0, 1], [3, 1, 2]] {
            v[to] = v[to].wrapping_add(v[a].wrapping_mul(v[b]));
        }
    };
    round(&mut v);
    v = v.map(|x| x ^ (x >> 16));
    round(&mut v);
    f64::from(v[0] >> 8) / f64::from(1 << 24)
}

/// The token at which the running sum of probabilities exceeds `u`, and how far `u` is from another's.
pub fn draw(probabilities: &[f64], u: f64) -> (usize, f64) {
    let mut sum = 0.0;
    let mut last = (0, 0.0);
    for (token, &p) in probabilities.iter().enumerate() {
        if p == 0.0 {
            continue;
        }
        last = (token, (u - sum).min(sum + p - u));
        sum += p;
        if sum > u {
            break;
        }
    }
    last
}
