//! `--verify`: every row that the device computed, beside the same row of the oracle in f64.
//!
//! A value may be off by `atol + rtol * max |the oracle's row|`, the rule of the crate's own tests. It is
//! meant for inputs of magnitude about one.

use half::{bf16, f16};
use qkv::attention::{self, Align, Stage, T5};
use qkv::doctor::Tolerance;
use qkv::gpu::DType;
use qkv::reference::{self, Attention, AttentionOut, Offset};

use super::input::{Array, Input, Layout, axes};
use super::{Answer, Options};

/// What was compared, a result a line; or which rows are wrong. Keys and values are those of IN or, where storage is
/// quantised, as the device has them.
pub fn verify(
    input: &Input,
    keys_and_values: [&[f32]; 2],
    options: &Options,
    operator: &attention::Options,
    answer: &Answer,
) -> Result<String, String> {
    let [_, _, k_len, dv] = input.layout.swap(axes(&input.v));
    let tolerance = |dtype| Tolerance::new(dtype, k_len);
    let mut out = Judge::new("out", tolerance(options.dtype()));
    let mut lse = Judge::new("lse", tolerance(DType::F32));
    let mut weights = Judge::new("weights", tolerance(DType::F32));
    let oracle = Oracle::new(input, keys_and_values, options, operator);
    oracle.each_row(|at, row, want| {
        let from = row_start(&input.shapes().out, input.layout, row);
        out.row(at, &answer.out[from..][..dv as usize], &want.out);
        let [b, h, q_len, _] = input.shapes().weights;
        let number = row_start(&[b, h, q_len, 1], Layout::Bhld, row);
        if let Some(values) = &answer.lse {
            lse.row(at, &values[number..][..1], &want.lse);
        }
        if let Some(values) = &answer.weights {
            let (mut stage, past) = match operator.stage {
                Stage::Raw => (want.raw, f64::NEG_INFINITY),
                Stage::Softcap => (want.softcapped, f64::NEG_INFINITY),
                Stage::Biased => (want.biased, f64::NEG_INFINITY),
                Stage::Softmax => (want.weights, 0.0),
            };
            let k_len = k_len as usize;
            stage.resize(k_len, past);
            weights.row(at, &values[number * k_len..][..k_len], &stage);
        }
    });
    let asked = [
        (out, true),
        (lse, answer.lse.is_some()),
        (weights, answer.weights.is_some()),
    ];
    let verdicts = asked.into_iter().filter(|&(_, asked)| asked);
    verdicts.map(|(judge, _)| judge.verdict()).collect()
}

/// The first element of row `[b, h, i]` of an operand of that shape.
fn row_start(shape: &[u32; 4], layout: Layout, [b, h, i]: [u32; 3]) -> usize {
    let [b, y, x, _] = layout.swap([b, h, i, 0]).map(|n| n as usize);
    let [_, ys, xs, d] = shape.map(|n| n as usize);
    ((b * ys + y) * xs + x) * d
}

/// The operator's definition, fed with what the device saw: operands rounded to their storage type.
struct Oracle<'a> {
    input: &'a Input,
    operator: &'a attention::Options,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    alibi: Option<Vec<f64>>,
    sinks: Option<Vec<f64>>,
}

impl<'a> Oracle<'a> {
    fn new(
        input: &'a Input,
        [k, v]: [&[f32]; 2],
        options: &Options,
        operator: &'a attention::Options,
    ) -> Self {
        let (storage, kv) = (options.dtype(), options.kv_dtype());
        let wide = |array: &Option<Array<f32>>| {
            let array = array.as_ref();
            array.map(|array| rounded(DType::F32, &array.values))
        };
        Oracle {
            input,
            operator,
            q: rounded(storage, &input.q.values),
            k: rounded(kv, k),
            v: rounded(kv, v),
            alibi: wide(&input.alibi),
            sinks: wide(&input.sinks),
        }
    }

    /// Calls back with each row of each sequence: where it stands among its own, where it is stored, and
    /// what it should be.
    fn each_row(&self, mut see: impl FnMut([u32; 3], [u32; 3], AttentionOut)) {
        let input = self.input;
        let [batch, heads, q_len, _] = input.cells();
        let [kv_batch, kv_heads, k_len, _] = input.layout.swap(axes(&input.k));
        let kv_batch = if input.cu_k.is_some() {
            batch
        } else {
            kv_batch
        };
        for b in 0..batch {
            let kb = b / (batch / kv_batch);
            let (q_batch, q_from, queries) = sequence(&input.cu_q, b, q_len);
            let (k_batch, k_from, mut keys) = sequence(&input.cu_k, kb, k_len);
            if let Some(lengths) = &input.kv_len {
                keys = lengths.values[kb as usize];
            }
            for h in 0..heads {
                let kv_head = h / (heads / kv_heads);
                let gather = |of: &Array<f32>, values: &[f64]| -> Vec<f64> {
                    let width = of.shape[3] as usize;
                    let row =
                        |j| row_start(&axes(of), input.layout, [k_batch, kv_head, k_from + j]);
                    let rows = (0..keys).flat_map(|j| &values[row(j)..][..width]);
                    rows.copied().collect()
                };
                let (k, v) = (gather(&input.k, &self.k), gather(&input.v, &self.v));
                for i in 0..queries {
                    let row = [q_batch, h, q_from + i];
                    see(
                        [b, h, i],
                        row,
                        self.row([b, h, i], row, queries, keys, &k, &v),
                    );
                }
            }
        }
    }

    /// One row: query `i` of sequence `b`, on the keys and values of its head.
    fn row(
        &self,
        [b, h, i]: [u32; 3],
        stored: [u32; 3],
        queries: u32,
        keys: u32,
        k: &[f64],
        v: &[f64],
    ) -> AttentionOut {
        let (input, operator) = (self.input, self.operator);
        let (d, dv) = (input.q.shape[3] as usize, input.v.shape[3] as usize);
        let q = &self.q[row_start(&axes(&input.q), input.layout, stored)..][..d];
        let offset = match (&input.q_offset, operator.align) {
            (Some(offsets), _) => i64::from(offsets.values[b as usize]),
            (None, Align::TopLeft) => 0,
            (None, Align::BottomRight) => i64::from(keys) - i64::from(queries),
        };
        let position = i64::from(i) + offset;
        let prefix = input.prefix_len.as_ref();
        let prefix = prefix.map_or(0, |prefix| prefix.values[b as usize]);
        let [left, right] = operator.window;
        let in_range = |j: u32| {
            let distance = i64::from(j) - position;
            j < prefix
                || ((!operator.causal || distance <= 0)
                    && left.is_none_or(|left| distance >= -i64::from(left))
                    && right.is_none_or(|right| distance <= i64::from(right)))
        };
        let mask = input.mask.as_ref();
        let allowed = |j| in_range(j) && mask.is_none_or(|mask| *mask.at([b, h, i, j]) != 0);
        let mask: Vec<bool> = (0..keys).map(allowed).collect();
        let added = |j| {
            let own = input
                .bias
                .as_ref()
                .map_or(0.0, |bias| f64::from(*bias.at([b, h, i, j])));
            let relative = match (&input.t5, operator.t5) {
                (Some(table), Some(t5)) => {
                    let bucket = bucket(t5, table.shape[0], i64::from(j) - position);
                    f64::from(table.values[(bucket * table.shape[1] + h) as usize])
                }
                _ => 0.0,
            };
            // A bias this low masks.
            if own <= -1e30 {
                f64::NEG_INFINITY
            } else {
                own + relative
            }
        };
        let bias: Vec<f64> = (0..keys).map(added).collect();
        let offsets = [position];
        let plain = Attention::new([1, 1, 1, d], [1, 1, keys as usize, dv], q, k, v);
        reference::attention(&Attention {
            scale: operator.scale.map_or(plain.scale, f64::from),
            softcap: operator.softcap.map(f64::from),
            bias: Some(&bias),
            alibi: of_head(&self.alibi, h),
            mask: Some(&mask),
            offset: Offset::PerRow(&offsets),
            sinks: of_head(&self.sinks, h),
            ..plain
        })
    }
}

/// The one value of a head.
fn of_head(values: &Option<Vec<f64>>, h: u32) -> Option<&[f64]> {
    values.as_ref().map(|values| &values[h as usize..][..1])
}

/// The batch row that stores sequence `b`, its first row in it, and the number of its rows.
fn sequence(starts: &Option<Array<u32>>, b: u32, len: u32) -> (u32, u32, u32) {
    match starts {
        None => (b, 0, len),
        Some(starts) => {
            let (from, to) = (starts.values[b as usize], starts.values[b as usize + 1]);
            (0, from, to - from)
        }
    }
}

/// T5's bucket of a key `distance` after the query (Raffel et al. 2020, section 2.1), of `buckets`.
fn bucket(t5: T5, buckets: u32, distance: i64) -> u32 {
    let (buckets, side) = match t5.bidirectional {
        true => (buckets / 2, if distance > 0 { buckets / 2 } else { 0 }),
        false => (buckets, 0),
    };
    let n = match t5.bidirectional {
        true => distance.abs(),
        false => (-distance).max(0),
    };
    let exact = buckets / 2;
    if n < i64::from(exact) {
        return side + n as u32;
    }
    let exact_f = f64::from(exact);
    let far = (n as f64 / exact_f).ln() / (f64::from(t5.max_distance) / exact_f).ln();
    // A logarithm that should be whole may lie just below.
    let bucket = exact + (far * f64::from(buckets - exact) + 1e-9) as u32;
    side + bucket.min(buckets - 1)
}

/// Values as a storage type has them.
fn rounded(dtype: DType, values: &[f32]) -> Vec<f64> {
    let round = |&x: &f32| match dtype {
        DType::F16 => f16::from_f32(x).to_f64(),
        DType::BF16 => bf16::from_f32(x).to_f64(),
        _ => f64::from(x),
    };
    values.iter().map(round).collect()
}

/// Compares the rows of one result.
struct Judge {
    name: &'static str,
    tolerance: Tolerance,
    rows: u64,
    wrong: u64,
    first: Option<String>,
    /// The largest error, in units of what is allowed.
    worst: f64,
}

impl Judge {
    fn new(name: &'static str, tolerance: Tolerance) -> Self {
        Judge {
            name,
            tolerance,
            rows: 0,
            wrong: 0,
            first: None,
            worst: 0.0,
        }
    }

    fn row(&mut self, [b, h, i]: [u32; 3], got: &[f32], want: &[f64]) {
        self.rows += 1;
        let mut is_wrong = false;
        for (column, ratio) in self.tolerance.errors(got, want).enumerate() {
            self.worst = self.worst.max(ratio);
            if ratio > 1.0 {
                is_wrong = true;
                let (got, want) = (got[column], want[column]);
                self.first.get_or_insert_with(|| {
                    format!(
                        "batch {b} head {h} query {i} column {column}: {got} for {want}, \
                        off by {ratio:.3} times what is allowed"
                    )
                });
            }
        }
        self.wrong += u64::from(is_wrong);
    }

    /// A line, good or bad.
    fn verdict(self) -> Result<String, String> {
        let Judge {
            name,
            rows,
            wrong,
            worst,
            ..
        } = self;
        match self.first {
            None => Ok(format!(
                "{name}: {rows} rows equal the oracle's; worst {worst:.3} of the tolerance\n"
            )),
            Some(first) => Err(format!(
                "{name}: {wrong} of {rows} rows are wrong; first {first}; worst {worst:.3} times the tolerance"
            )),
        }
    }
}
