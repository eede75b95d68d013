//! Attention as eager PyTorch computes it in a 16-bit type: what our errors are held beside.

use super::attention::Attention;

/// The operator in the manner of `softmax(q @ k.T * scale + bias).to(dtype) @ v` with every tensor in one
/// storage type: sums of products in f32, and each operation's result rounded to the type. The answer is
/// `[B, H, Q, Dv]`; a row that attends to no key is zeros.
///
/// `round` gives the nearest value of the storage type. Inputs are such values already.
pub fn attention_eager(a: &Attention, round: impl Fn(f64) -> f64) -> Vec<f64> {
    let round = |x: f32| round(f64::from(x)) as f32;
    let dot =
        |x: &mut dyn Iterator<Item = (f32, f32)>| round(x.fold(0.0, |sum, (x, y)| sum + x * y));
    let mut out = Vec::with_capacity(a.batch * a.heads * a.q_len * a.value_dim);
    for b in 0..a.batch {
        for h in 0..a.heads {
            let kv_head = b * a.kv_heads + h / (a.heads / a.kv_heads);
            for i in 0..a.q_len {
                let row = (b * a.heads + h) * a.q_len + i;
                let q = &a.q[row * a.head_dim..][..a.head_dim];
                let score = |j: usize| {
                    if !a.attends(b, h, i, j) {
                        return f32::NEG_INFINITY;
                    }
                    let k = &a.k[(kv_head * a.k_len + j) * a.head_dim..][..a.head_dim];
                    let pairs = q.iter().zip(k).map(|(&x, &y)| (x as f32, y as f32));
                    let mut score = round(dot(&mut { pairs }) * a.scale as f32);
                    if let Some(cap) = a.softcap {
                        let cap = cap as f32;
                        score = round(cap * round(round(score / cap).tanh()));
                    }
                    if let Some(bias) = a.bias {
                        score = round(score + round(bias[a.cell(b, h, i, j)] as f32));
                    }
                    if let Some(slopes) = a.alibi {
                        let distance = (a.position(b, i) - j as i64).abs() as f64;
                        score = round(score - round((slopes[h] * distance) as f32));
                    }
                    score
                };
                let scores: Vec<f32> = (0..a.length(b)).map(score).collect();
                let sink = a
                    .sinks
                    .map_or(f32::NEG_INFINITY, |sinks| round(sinks[h] as f32));
                let top = scores.iter().copied().fold(sink, f32::max);
                if top == f32::NEG_INFINITY {
                    out.extend((0..a.value_dim).map(|_| 0.0));
                    continue;
                }
                // Softmax is made in f32 and rounded once.
                let powers: Vec<f32> = scores.iter().map(|s| (s - top).exp()).collect();
                let sum = (sink - top).exp() + powers.iter().sum::<f32>();
                let weights: Vec<f32> = powers.iter().map(|p| round(p / sum)).collect();
                for c in 0..a.value_dim {
                    let value = |j: usize| a.v[(kv_head * a.k_len + j) * a.value_dim + c] as f32;
                    let pairs = weights.iter().enumerate().filter(|&(_, &w)| w > 0.0);
                    let pairs = pairs.map(|(j, &w)| (w, value(j)));
                    out.push(f64::from(dot(&mut { pairs })));
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::{attention, expand};

    /// `((n * step + start) % modulus - half) / over`, which both types hold exactly.
    fn ramp(len: usize, [step, start, modulus, half]: [usize; 4], over: f64) -> Vec<f64> {
        (0..len)
            .map(|n| ((n * step + start) % modulus) as f64 - half as f64)
            .map(|x| x / over)
            .collect()
    }

    /// What torch 2.15.0 answers on the processor, plain and with softcap and bias in f16, then in bf16, as bits;
    /// H 2, Hk 1, Q 3, K 7, D 5, Dv 4, causal:
    ///
    /// ```text
    /// s = torch.matmul(q, k.transpose(-1, -2)) * D**-0.5
    /// s = torch.tanh(s / 2.0) * 2.0 + bias          # where capped
    /// s = s.masked_fill(~torch.ones(Q, K, dtype=torch.bool).tril(K - Q), -torch.inf)
    /// out = torch.matmul(torch.softmax(s, -1, dtype=torch.float32).to(dtype), v)
    /// ```
    const TORCH: [[u16; 24]; 4] = [
        [
            0xb710, 0x317e, 0x3945, 0xb8f1, 0xb5fc, 0x321a, 0x3a0b, 0xb987, 0xb605, 0x30b2, 0x3a41,
            0xb99c, 0x398f, 0x3724, 0xb9f5, 0xb5a6, 0x39d1, 0x30fa, 0xb913, 0xb4a7, 0x2f06, 0xb5c7,
            0xb75d, 0xa514,
        ],
        [
            0x33cb, 0x39cc, 0xb427, 0xb99f, 0x2ed4, 0x3827, 0xac1e, 0xb89d, 0x2d48, 0x3633, 0x29ee,
            0xb8bd, 0x3b89, 0x3c9e, 0xbc98, 0xb7a2, 0x3b2b, 0x3bbe, 0xbc35, 0xb65a, 0x39c3, 0xbbf3,
            0xb483, 0x28e2,
        ],
        [
            0xbee2, 0x3e30, 0x3f29, 0xbf1f, 0xbec0, 0x3e43, 0x3f42, 0xbf31, 0xbec0, 0x3e15, 0x3f48,
            0xbf33, 0x3f33, 0x3ee7, 0xbf40, 0xbeb6, 0x3f3b, 0x3e21, 0xbf23, 0xbe95, 0x3de3, 0xbeb9,
            0xbeec, 0xbca3,
        ],
        [
            0x3e7a, 0x3f3a, 0xbe86, 0xbf34, 0x3ddd, 0x3f05, 0xbd87, 0xbf14, 0x3da9, 0x3ec6, 0x3d3c,
            0xbf17, 0x3f71, 0x3f93, 0xbf93, 0xbef4, 0x3f65, 0x3f77, 0xbf87, 0xbecb, 0x3f38, 0xbf7e,
            0xbe90, 0x3d1b,
        ],
    ];

    #[test]
    fn it_gives_the_bits_of_torch() {
        let q = ramp(2 * 3 * 5, [7, 0, 33, 16], 8.0);
        let k = ramp(7 * 5, [11, 3, 31, 15], 8.0);
        let v = ramp(7 * 4, [13, 5, 63, 31], 16.0);
        let bias = ramp(2 * 3 * 7, [5, 2, 17, 8], 4.0);
        let f16 = |x: f64| half::f16::from_f64(x).to_f64();
        let bf16 = |x: f64| half::bf16::from_f64(x).to_f64();
        for capped in [false, true] {
            let problem = Attention {
                causal: true,
                softcap: capped.then_some(2.0),
                bias: capped.then_some(&bias),
                ..Attention::new([1, 2, 3, 5], [1, 1, 7, 4], &q, &k, &v)
            };
            let at = usize::from(capped);
            let want = TORCH[at].map(|bits| half::f16::from_bits(bits).to_f64());
            assert_eq!(attention_eager(&problem, f16), want);
            let want = TORCH[2 + at].map(|bits| half::bf16::from_bits(bits).to_f64());
            assert_eq!(attention_eager(&problem, bf16), want);
        }
    }

    #[test]
    fn without_rounding_it_is_the_oracle() {
        let q = ramp(2 * 3 * 5, [7, 0, 33, 16], 8.0);
        let k = ramp(7 * 5, [11, 3, 31, 15], 8.0);
        let v = ramp(7 * 4, [13, 5, 63, 31], 16.0);
        let mask = expand([1, 2, 3, 7], |_, h, i, j| (h + i + j) % 3 > 0 && i != 1);
        let problem = Attention {
            alibi: Some(&[0.25, 0.5]),
            sinks: Some(&[0.5, -1.0]),
            mask: Some(&mask),
            kv_len: Some(&[6]),
            softcap: Some(3.0),
            ..Attention::new([1, 2, 3, 5], [1, 1, 7, 4], &q, &k, &v)
        };
        let want = attention(&problem).out;
        for (got, want) in attention_eager(&problem, |x| x).into_iter().zip(want) {
            assert!((got - want).abs() < 1e-5, "{got} is not {want}");
        }
    }
}
