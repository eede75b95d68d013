//! Attention with every option, one score at a time.

/// Where query `i` stands among the keys: at key position `i + offset`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Offset<'a> {
    /// Offset 0: the first query stands at the first key.
    TopLeft,
    /// Offset `kv_len - Q`, which may be negative: the last query stands at the last key.
    BottomRight,
    /// An offset for each batch row, `[B]`.
    PerRow(&'a [i64]),
}

/// One problem: the inputs and every option of the operator.
///
/// The law of scores, in this order: scale, softcap, bias and ALiBi, mask, sinks.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// B, batch rows.
    pub batch: usize,
    /// H, query heads.
    pub heads: usize,
    /// Hk, key and value heads: query head `h` uses `h / (H / Hk)`.
    pub kv_heads: usize,
    /// Q, query rows.
    pub q_len: usize,
    /// K, key rows stored; how many of them count is `kv_len`.
    pub k_len: usize,
    /// D, the length of a query and of a key.
    pub head_dim: usize,
    /// Dv, the length of a value.
    pub value_dim: usize,
    /// Queries, `[B, H, Q, D]`.
    pub q: &'a [f64],
    /// Keys, `[B, Hk, K, D]`.
    pub k: &'a [f64],
    /// Values, `[B, Hk, K, Dv]`.
    pub v: &'a [f64],
    /// What the products are multiplied by: 1 / sqrt(D) unless told.
    pub scale: f64,
    /// `c * tanh(s / c)` of every scaled product, where given.
    pub softcap: Option<f64>,
    /// Added to the scores, `[B, H, Q, K]`; -inf masks. [`expand`] makes one from a closure.
    pub bias: Option<&'a [f64]>,
    /// `-slope * |i + offset - j|` is added to the scores, `[H]`.
    pub alibi: Option<&'a [f64]>,
    /// True attends, `[B, H, Q, K]`. [`expand`] makes one from a closure.
    pub mask: Option<&'a [bool]>,
    /// Query `i` attends to no key past its own position `i + offset`.
    pub causal: bool,
    /// How far it looks to the left and to the right of its own position; -1 is without bound.
    pub window: (i64, i64),
    /// Where the queries stand.
    pub offset: Offset<'a>,
    /// How many keys count in each batch row, `[B]`; all of them where absent.
    pub kv_len: Option<&'a [usize]>,
    /// One more logit in the denominator, with no value of its own, `[H]`.
    pub sinks: Option<&'a [f64]>,
}

/// What [`attention`] answers.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionOut {
    /// The weighted values; zeros for a row that attends to no key, `[B, H, Q, Dv]`.
    pub out: Vec<f64>,
    /// The natural logarithm of the softmax's denominator. A row that attends to no key has its
    /// sink, or -inf without one, `[B, H, Q]`.
    pub lse: Vec<f64>,
    /// The weights after softmax, zero where masked, `[B, H, Q, K]`.
    pub weights: Vec<f64>,
    /// The scaled products, also of masked keys; -inf from `kv_len` on, `[B, H, Q, K]`.
    pub raw: Vec<f64>,
    /// The same after softcap, `[B, H, Q, K]`.
    pub softcapped: Vec<f64>,
    /// After bias, ALiBi and mask: -inf where masked, `[B, H, Q, K]`.
    pub biased: Vec<f64>,
}

/// `[B, H, Q, K]` filled by a function of the four indices: a bias or a mask.
pub fn expand<T>(
    [batch, heads, q_len, k_len]: [usize; 4],
    mut cell: impl FnMut(usize, usize, usize, usize) -> T,
) -> Vec<T> {
    let mut all = Vec::with_capacity(batch * heads * q_len * k_len);
    for b in 0..batch {
        for h in 0..heads {
            for i in 0..q_len {
                for j in 0..k_len {
                    all.push(cell(b, h, i, j));
                }
            }
        }
    }
    all
}

impl<'a> Attention<'a> {
    /// Plain attention: scale 1 / sqrt(D), every query sees every key. `q_shape` is `[B, H, Q, D]`,
    /// `v_shape` is `[B, Hk, K, Dv]`. `q` `[B, H, Q, D]`, `k` `[B, Hk, K, D]`, `v` `[B, Hk, K, Dv]`.
    pub fn new(
        q_shape: [usize; 4],
        v_shape: [usize; 4],
        q: &'a [f64],
        k: &'a [f64],
        v: &'a [f64],
    ) -> Self {
        let [batch, heads, q_len, head_dim] = q_shape;
        let [v_batch, kv_heads, k_len, value_dim] = v_shape;
        assert_eq!(batch, v_batch, "batch rows of q and v");
        Attention {
            batch,
            heads,
            kv_heads,
            q_len,
            k_len,
            head_dim,
            value_dim,
            q,
            k,
            v,
            scale: 1.0 / (head_dim as f64).sqrt(),
            softcap: None,
            bias: None,
            alibi: None,
            mask: None,
            causal: false,
            window: (-1, -1),
            offset: Offset::BottomRight,
            kv_len: None,
            sinks: None,
        }
    }

    /// How many keys count in batch row `b`.
    pub(super) fn length(&self, b: usize) -> usize {
        self.kv_len.map_or(self.k_len, |lengths| lengths[b])
    }

    /// The key position at which query `i` of batch row `b` stands.
    pub(super) fn position(&self, b: usize, i: usize) -> i64 {
        let offset = match self.offset {
            Offset::TopLeft => 0,
            Offset::BottomRight => self.length(b) as i64 - self.q_len as i64,
            Offset::PerRow(offsets) => offsets[b],
        };
        i as i64 + offset
    }

    /// Where `[b, h, i, j]` lies in `[B, H, Q, K]`.
    pub(super) fn cell(&self, b: usize, h: usize, i: usize, j: usize) -> usize {
        ((b * self.heads + h) * self.q_len + i) * self.k_len + j
    }

    /// Whether query `i` attends to key `j`, by every rule but the bias.
    pub(super) fn attends(&self, b: usize, h: usize, i: usize, j: usize) -> bool {
        let key = j as i64;
        let position = self.position(b, i);
        let (left, right) = self.window;
        j < self.length(b)
            && (!self.causal || key <= position)
            && (left < 0 || key >= position - left)
            && (right < 0 || key <= position + right)
            && self.mask.is_none_or(|mask| mask[self.cell(b, h, i, j)])
    }

    fn check(&self) {
        let Attention {
            batch,
            heads,
            kv_heads,
            q_len,
            k_len,
            head_dim,
            value_dim,
            ..
        } = *self;
        assert!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "{heads} query heads on {kv_heads}"
        );
        assert_eq!(self.q.len(), batch * heads * q_len * head_dim, "q");
        assert_eq!(self.k.len(), batch * kv_heads * k_len * head_dim, "k");
        assert_eq!(self.v.len(), batch * kv_heads * k_len * value_dim, "v");
        let cells = batch * heads * q_len * k_len;
        assert!(self.bias.is_none_or(|x| x.len() == cells), "bias");
        assert!(self.mask.is_none_or(|x| x.len() == cells), "mask");
        assert!(self.alibi.is_none_or(|x| x.len() == heads), "alibi");
        assert!(self.sinks.is_none_or(|x| x.len() == heads), "sinks");
        assert!(
            self.kv_len
                .is_none_or(|x| x.len() == batch && x.iter().all(|&n| n <= k_len)),
            "kv_len"
        );
        if let Offset::PerRow(offsets) = self.offset {
            assert_eq!(offsets.len(), batch, "offset");
        }
        assert!(self.softcap.is_none_or(|cap| cap > 0.0), "softcap");
        assert!(
            self.window.0 >= -1 && self.window.1 >= -1,
            "window {:?}",
            self.window
        );
    }
}

/// The operator. What lies in `k` and `v` from `kv_len` on reaches no result, and what lies at a
/// masked key reaches none but the two stages before the mask, `raw` and `softcapped`.
pub fn attention(a: &Attention) -> AttentionOut {
    a.check();
    let rows = a.batch * a.heads * a.q_len;
    let mut answer = AttentionOut {
        out: vec![0.0; rows * a.value_dim],
        lse: vec![f64::NEG_INFINITY; rows],
        weights: vec![0.0; rows * a.k_len],
        raw: vec![f64::NEG_INFINITY; rows * a.k_len],
        softcapped: vec![f64::NEG_INFINITY; rows * a.k_len],
        biased: vec![f64::NEG_INFINITY; rows * a.k_len],
    };
    for b in 0..a.batch {
        for h in 0..a.heads {
            for i in 0..a.q_len {
                attend_row(a, &mut answer, b, h, i);
            }
        }
    }
    answer
}

fn attend_row(a: &Attention, answer: &mut AttentionOut, b: usize, h: usize, i: usize) {
    let row = (b * a.heads + h) * a.q_len + i;
    let kv_head = b * a.kv_heads + h / (a.heads / a.kv_heads);
    let q = &a.q[row * a.head_dim..][..a.head_dim];
    for j in 0..a.length(b) {
        let k = &a.k[(kv_head * a.k_len + j) * a.head_dim..][..a.head_dim];
        let cell = a.cell(b, h, i, j);
        let mut score = a.scale * q.iter().zip(k).map(|(x, y)| x * y).sum::<f64>();
        answer.raw[cell] = score;
        if let Some(cap) = a.softcap {
            score = cap * (score / cap).tanh();
        }
        answer.softcapped[cell] = score;
        if !a.attends(b, h, i, j) {
            continue;
        }
        if let Some(bias) = a.bias {
            // A bias of -inf masks whatever the score is, NaN included.
            if bias[cell] == f64::NEG_INFINITY {
                continue;
            }
            score += bias[cell];
        }
        if let Some(slopes) = a.alibi {
            score -= slopes[h] * (a.position(b, i) - j as i64).abs() as f64;
        }
        answer.biased[cell] = score;
    }

    let scores = &answer.biased[row * a.k_len..][..a.k_len];
    let sink = a.sinks.map_or(f64::NEG_INFINITY, |sinks| sinks[h]);
    // A NaN among the scores makes the row NaN.
    let larger = |a: f64, b: f64| if a > b || a.is_nan() { a } else { b };
    let top = scores.iter().copied().fold(sink, larger);
    if top == f64::NEG_INFINITY {
        return;
    }
    let sum = (sink - top).exp() + scores.iter().map(|s| (s - top).exp()).sum::<f64>();
    answer.lse[row] = top + sum.ln();
    for j in 0..a.k_len {
        let cell = row * a.k_len + j;
        if answer.biased[cell] == f64::NEG_INFINITY {
            continue;
        }
        let weight = (answer.biased[cell] - top).exp() / sum;
        answer.weights[cell] = weight;
        let v = &a.v[(kv_head * a.k_len + j) * a.value_dim..][..a.value_dim];
        let out = &mut answer.out[row * a.value_dim..][..a.value_dim];
        for (o, x) in out.iter_mut().zip(v) {
            *o += weight * x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{assert_close, noise};
    use super::*;

    const Q_SHAPE: [usize; 4] = [2, 4, 5, 3];
    const V_SHAPE: [usize; 4] = [2, 2, 7, 6];
    const CELLS: [usize; 4] = [2, 4, 5, 7];

    struct Inputs {
        q: Vec<f64>,
        k: Vec<f64>,
        v: Vec<f64>,
    }

    fn inputs() -> Inputs {
        Inputs {
            q: noise(1, 2 * 4 * 5 * 3),
            k: noise(2, 2 * 2 * 7 * 3),
            v: noise(3, 2 * 2 * 7 * 6),
        }
    }

    impl Inputs {
        fn problem(&self) -> Attention<'_> {
            Attention::new(Q_SHAPE, V_SHAPE, &self.q, &self.k, &self.v)
        }
    }

    fn row_sums(x: &[f64], len: usize) -> Vec<f64> {
        x.chunks(len).map(|row| row.iter().sum()).collect()
    }

    #[test]
    fn two_keys_by_hand() {
        // Scores ln 3 and 0: weights 3/4 and 1/4, denominator 4.
        let (q, k, v) = ([1.0], [3f64.ln(), 0.0], [8.0, 1.0, 4.0, 5.0]);
        let got = attention(&Attention::new([1, 1, 1, 1], [1, 1, 2, 2], &q, &k, &v));
        assert_close(&got.weights, &[0.75, 0.25]);
        assert_close(&got.out, &[7.0, 2.0]);
        assert_close(&got.lse, &[4f64.ln()]);
        assert_close(&got.raw, &k);
    }

    #[test]
    fn the_law_of_scores_in_its_order() {
        let (q, k, v) = ([4.0], [1.0, 2.0, 3.0], [1.0, 0.0, 9.0]);
        let (bias, alibi, sinks) = ([0.5, -0.25, 7.0], [0.1], [0.3]);
        let got = attention(&Attention {
            scale: 0.5,
            softcap: Some(5.0),
            bias: Some(&bias),
            alibi: Some(&alibi),
            mask: Some(&[true, true, false]),
            sinks: Some(&sinks),
            ..Attention::new([1, 1, 1, 1], [1, 1, 3, 1], &q, &k, &v)
        });
        let capped = [2.0f64, 4.0, 6.0].map(|s| 5.0 * (s / 5.0).tanh());
        // The only query stands at the last of three keys.
        let scores = [capped[0] + 0.5 - 0.2, capped[1] - 0.25 - 0.1];
        let sum = scores[0].exp() + scores[1].exp() + 0.3f64.exp();
        assert_close(&got.raw, &[2.0, 4.0, 6.0]);
        assert_close(&got.softcapped, &capped);
        assert_close(&got.biased, &[scores[0], scores[1], f64::NEG_INFINITY]);
        assert_close(
            &got.weights,
            &[scores[0].exp() / sum, scores[1].exp() / sum, 0.0],
        );
        assert_close(&got.out, &[scores[0].exp() / sum]);
        assert_close(&got.lse, &[sum.ln()]);
    }

    #[test]
    fn weights_sum_to_one_and_lse_is_their_denominator() {
        let x = inputs();
        let got = attention(&Attention {
            softcap: Some(0.7),
            alibi: Some(&[0.5, 0.25, 0.125, 0.0625]),
            kv_len: Some(&[7, 6]),
            ..x.problem()
        });
        assert_close(&row_sums(&got.weights, 7), &[1.0; 40]);
        for (cell, weight) in got.weights.iter().enumerate() {
            assert_close(&[*weight], &[(got.biased[cell] - got.lse[cell / 7]).exp()]);
        }
    }

    #[test]
    fn causal_and_window_are_masks() {
        let x = inputs();
        let kv_len = [7, 4];
        let offsets: [[i64; 2]; 3] = [[0, 0], [2, -1], [-2, 3]];
        let places = [
            Offset::TopLeft,
            Offset::BottomRight,
            Offset::PerRow(&offsets[2]),
        ];
        for (offset, place) in offsets.iter().zip(places) {
            for (causal, window) in [(true, (-1, -1)), (false, (1, 2)), (true, (2, -1))] {
                let got = attention(&Attention {
                    causal,
                    window,
                    offset: place,
                    kv_len: Some(&kv_len),
                    ..x.problem()
                });
                let mask = expand(CELLS, |b, _, i, j| {
                    let distance = j as i64 - (i as i64 + offset[b]);
                    j < kv_len[b]
                        && (!causal || distance <= 0)
                        && (window.0 < 0 || distance >= -window.0)
                        && (window.1 < 0 || distance <= window.1)
                });
                let want = attention(&Attention {
                    mask: Some(&mask),
                    ..x.problem()
                });
                assert_eq!(got.out, want.out);
                assert_eq!(got.lse, want.lse);
                assert_eq!(got.weights, want.weights);
                assert_eq!(got.biased, want.biased);
            }
        }
    }

    #[test]
    fn fully_masked_row_is_zero() {
        let x = inputs();
        // Two of five queries stand before the first of three keys.
        let masked = Attention {
            causal: true,
            kv_len: Some(&[3, 3]),
            ..x.problem()
        };
        let got = attention(&masked);
        assert_eq!(got.out[..12], [0.0; 12]);
        assert_eq!(got.weights[..14], [0.0; 14]);
        assert_eq!(got.lse[..2], [f64::NEG_INFINITY; 2]);
        assert!(got.lse[2].is_finite());

        let sinks = [0.25, -1.0, 3.0, 0.0];
        let got = attention(&Attention {
            sinks: Some(&sinks),
            ..masked
        });
        assert_eq!(got.out[..12], [0.0; 12]);
        assert_eq!(got.lse[..2], [0.25; 2]);

        // Whatever the keys are.
        let bias = [f64::NEG_INFINITY; 2 * 4 * 5 * 7];
        let nan = vec![f64::NAN; x.k.len()];
        let got = attention(&Attention {
            bias: Some(&bias),
            k: &nan,
            ..x.problem()
        });
        assert!(got.out.iter().chain(&got.weights).all(|&w| w == 0.0));
        assert!(got.lse.iter().all(|&l| l == f64::NEG_INFINITY));
    }

    #[test]
    fn no_keys_at_all() {
        let q = noise(1, 6);
        let got = attention(&Attention::new([1, 2, 1, 3], [1, 1, 0, 4], &q, &[], &[]));
        assert_eq!(got.out, [0.0; 8]);
        assert_eq!(got.lse, [f64::NEG_INFINITY; 2]);
        assert!(got.weights.is_empty());
    }

    #[test]
    fn sinks_take_mass_and_leave_proportions() {
        let x = inputs();
        let without = attention(&x.problem());
        let with = attention(&Attention {
            sinks: Some(&[0.5, -2.0, 100.0, f64::NEG_INFINITY]),
            ..x.problem()
        });
        for row in 0..40 {
            let sink: f64 = [0.5, -2.0, 100.0, f64::NEG_INFINITY][row / 5 % 4];
            let left = 1.0 / (1.0 + (sink - without.lse[row]).exp());
            let want: Vec<f64> = without.weights[row * 7..][..7]
                .iter()
                .map(|w| w * left)
                .collect();
            assert_close(&with.weights[row * 7..][..7], &want);
        }
    }

    #[test]
    fn what_is_not_attended_is_not_read() {
        let x = inputs();
        let mut poisoned = inputs();
        let kv_len = [3, 5];
        for (b, &length) in kv_len.iter().enumerate() {
            for kv_head in 0..2 {
                let row = (b * 2 + kv_head) * 7;
                // Past the length, and key 1, which the mask below empties.
                for j in (length..7).chain([1]) {
                    poisoned.k[(row + j) * 3..][..3].fill(f64::NAN);
                    poisoned.v[(row + j) * 6..][..6].fill(f64::NAN);
                }
            }
        }
        let mask = expand(CELLS, |_, _, _, j| j != 1);
        let options = Attention {
            kv_len: Some(&kv_len),
            mask: Some(&mask),
            ..x.problem()
        };
        let want = attention(&options);
        let got = attention(&Attention {
            k: &poisoned.k,
            v: &poisoned.v,
            ..options
        });
        assert_eq!(got.out, want.out);
        assert_eq!(got.lse, want.lse);
        assert_eq!(got.weights, want.weights);
        assert_eq!(got.biased, want.biased);
        assert!(want.raw[1].is_finite() && got.raw[1].is_nan());
        assert_eq!(got.raw[3], f64::NEG_INFINITY);
    }

    #[test]
    fn halves_merge_by_lse_into_the_whole() {
        let x = inputs();
        let half = |keep_left: bool| {
            let mask = expand(CELLS, |_, _, _, j| (j < 3) == keep_left);
            attention(&Attention {
                mask: Some(&mask),
                ..x.problem()
            })
        };
        let (left, right, whole) = (half(true), half(false), attention(&x.problem()));
        for row in 0..40 {
            let lse = (left.lse[row].exp() + right.lse[row].exp()).ln();
            let (l, r) = ((left.lse[row] - lse).exp(), (right.lse[row] - lse).exp());
            let merged: Vec<f64> = (row * 6..row * 6 + 6)
                .map(|at| l * left.out[at] + r * right.out[at])
                .collect();
            assert_close(&[lse], &[whole.lse[row]]);
            assert_close(&merged, &whole.out[row * 6..][..6]);
        }
    }

    #[test]
    fn grouped_heads_are_repeated_heads() {
        let x = inputs();
        let repeat = |rows: &[f64], head: usize| -> Vec<f64> {
            rows.chunks(head).flat_map(|h| [h, h].concat()).collect()
        };
        let (k, v) = (repeat(&x.k, 7 * 3), repeat(&x.v, 7 * 6));
        let want = attention(&Attention::new(Q_SHAPE, [2, 4, 7, 6], &x.q, &k, &v));
        assert_eq!(attention(&x.problem()), want);
    }

    #[test]
    fn a_batch_equals_its_singles() {
        let x = inputs();
        let options = Attention {
            causal: true,
            kv_len: Some(&[7, 5]),
            ..x.problem()
        };
        let got = attention(&options);
        for (b, length) in [7, 5].into_iter().enumerate() {
            let want = attention(&Attention {
                batch: 1,
                q: &x.q[b * 60..][..60],
                k: &x.k[b * 42..][..42],
                v: &x.v[b * 84..][..84],
                kv_len: Some(&[length]),
                ..options
            });
            assert_eq!(got.out[b * 120..][..120], want.out);
            assert_eq!(got.lse[b * 20..][..20], want.lse);
        }
    }

    #[test]
    fn huge_logits_stay_finite() {
        let (q, k, v) = ([1.0], [1e4, -1e4, 1e4], [2.0, 5.0, 4.0]);
        let got = attention(&Attention::new([1, 1, 1, 1], [1, 1, 3, 1], &q, &k, &v));
        assert_close(&got.out, &[3.0]);
        assert_close(&got.lse, &[1e4 + 2f64.ln()]);
    }
}
