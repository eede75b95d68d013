//! One shape on the device, and what the answer must be.

use std::cell::{Cell, RefCell};

use super::{KEPT_GROUPS, Shape};
use crate::attention::{Candidate, Options, Problem, Tensors, View, plan, record_as};
use crate::gpu::{DType, Gpu, Recorder, Recording, Tensor};
use crate::reference::{self, Attention, Offset};
use crate::{Error, Result};

/// Rows that are held against the oracle.
const ROWS: u64 = 12;
/// Multiply-adds that the oracle may take for them.
const WORK: u64 = 1 << 25;

/// A shape's tensors, and some rows of the answer.
pub(super) struct Job<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) shape: Shape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    mask: Option<Tensor>,
    options: Options,
    /// The oracle's rows, by number in `out`; those among them that candidates disagreed in.
    wanted: RefCell<Vec<(usize, Vec<f64>)>>,
    /// What the first candidate that was right answered.
    agreed: RefCell<Option<Vec<f32>>>,
    /// Whether that proved wrong since [`Job::take_doubt`] was asked.
    doubt: Cell<bool>,
}

/// How many numbers differ before they come again: a prime, so that a row comes again after as many rows only.
const PERIOD: usize = 65_521;

/// Numbers of variance about one, the same in every run, as the storage type holds them.
fn noise(seed: u64, n: usize, dtype: DType) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 3.5
    };
    let round = |x: f32| match dtype {
        DType::F16 => half::f16::from_f32(x).to_f32(),
        DType::BF16 => half::bf16::from_f32(x).to_f32(),
        _ => x,
    };
    let period: Vec<f32> = (0..n.min(PERIOD)).map(|_| round(next())).collect();
    let mut all = Vec::with_capacity(n);
    while all.len() < n {
        all.extend_from_slice(&period[..period.len().min(n - all.len())]);
    }
    all
}

/// Of q, k and v.
fn extents(shape: &Shape) -> [[u32; 4]; 3] {
    let &Shape {
        batch,
        heads,
        kv_heads,
        q_len,
        k_len,
        head_dim,
        value_dim,
        ..
    } = shape;
    [
        [batch, heads, q_len, head_dim],
        [batch, kv_heads, k_len, head_dim],
        [batch, kv_heads, k_len, value_dim],
    ]
}

/// The values of q, k and v.
fn values(shape: &Shape) -> [Vec<f32>; 3] {
    let extents = extents(shape);
    [0, 1, 2].map(|ix| {
        let n = extents[ix].iter().map(|&n| n as usize).product();
        noise(ix as u64 + 1, n, shape.dtype)
    })
}

impl<'a> Job<'a> {
    /// With tensors of any values, and no answer to hold others against.
    ///
    /// # Errors
    /// What attention refuses of the shape.
    pub(super) fn empty(gpu: &'a Gpu, shape: &Shape) -> Result<Job<'a>> {
        let &Shape {
            batch,
            heads,
            q_len,
            k_len,
            value_dim,
            dtype,
            ..
        } = shape;
        let [q, k, v] = extents(shape).map(|extents| gpu.empty("tuning", dtype, &extents));
        let seen = k_len - k_len / 4;
        let cells: Vec<u8> = (0..k_len).map(|j| u8::from(j < seen)).collect();
        let mask = shape.masked;
        let mask = mask.then(|| gpu.upload("mask", DType::Bool, &[1, 1, 1, k_len], &cells));
        let job = Job {
            gpu,
            shape: *shape,
            q: q?,
            k: k?,
            v: v?,
            out: gpu.empty("out", dtype, &[batch, heads, q_len, value_dim])?,
            mask: mask.transpose()?,
            options: Options {
                causal: shape.causal,
                window: [shape.window, None],
                f16_math: shape.f16_math,
                ..Options::default()
            },
            wanted: Default::default(),
            agreed: Default::default(),
            doubt: Default::default(),
        };
        plan(&job.problem()?, gpu.caps())?;
        Ok(job)
    }

    pub(super) fn new(gpu: &'a Gpu, shape: &Shape) -> Result<Job<'a>> {
        // Refuses before values are made.
        let mut job = Job::empty(gpu, shape)?;
        let (extents, values) = (extents(shape), values(shape));
        let upload =
            |ix: usize| gpu.upload_floats("tuning", shape.dtype, &extents[ix], &values[ix]);
        (job.q, job.k, job.v) = (upload(0)?, upload(1)?, upload(2)?);
        job.wanted = RefCell::new(job.oracle(&values));
        Ok(job)
    }

    fn tensors(&self) -> Result<Tensors<'_>> {
        let Shape {
            batch,
            heads,
            q_len,
            k_len,
            ..
        } = self.shape;
        let cells = [batch, heads, q_len, k_len];
        let mask = self.mask.as_ref();
        let mask = mask.map(|mask| View::broadcast(mask, cells)).transpose()?;
        let [q, k, v, out] = [&self.q, &self.k, &self.v, &self.out].map(View::bhld);
        Ok(Tensors {
            mask,
            ..Tensors::new(q?, k?, v?, out?)
        })
    }

    fn problem(&self) -> Result<Problem> {
        Problem::new(&self.tensors()?, &self.options)
    }

    /// The problems that the answer holds for.
    pub(super) fn bucket(&self) -> Result<String> {
        let bucket = self.problem()?.bucket();
        Ok(bucket.expect("a plain problem has a bucket"))
    }

    /// The kernels to try, the table's choice first.
    pub(super) fn kernels(&self) -> Result<Vec<Candidate>> {
        let kernels = Candidate::kernels(&self.problem()?, self.gpu.caps());
        match kernels.is_empty() {
            true => Err(Error::refused(
                "a shape",
                self.shape,
                "one that kernels fit",
            )),
            false => Ok(kernels),
        }
    }

    pub(super) fn other_splits(&self, candidate: Candidate) -> Result<Vec<Candidate>> {
        Ok(candidate.other_splits(&self.problem()?, self.gpu.caps()))
    }

    /// A candidate's commands.
    pub(super) fn record(&self, candidate: Candidate) -> Result<Recording> {
        self.record_with(candidate, &self.options)
    }

    pub(super) fn record_with(&self, candidate: Candidate, options: &Options) -> Result<Recording> {
        let mut recorder = Recorder::new(self.gpu);
        record_as(&mut recorder, &self.tensors()?, options, candidate)?;
        recorder.finish()
    }

    /// The shape, then with fewer and fewer heads, as long as those that are left still keep the device busy.
    pub(super) fn parts(&self) -> Result<Vec<Shape>> {
        let kept = KEPT_GROUPS[usize::from(self.gpu.caps().software)];
        let plan = plan(&self.problem()?, self.gpu.caps())?;
        let groups = plan.launches.iter().map(|launch| launch.groups).max();
        // Without splits, which are to be compared.
        let mut groups = groups.unwrap_or(0) / u64::from(plan.splits);
        let mut parts = vec![self.shape];
        let mut shape = self.shape;
        while let Some(half) = shape.half().filter(|_| groups / 2 >= kept) {
            groups /= 2;
            shape = half;
            parts.push(half);
        }
        Ok(parts)
    }

    /// Some rows of the answer, from all over it, from the values of q, k and v.
    fn oracle(&self, values: &[Vec<f32>; 3]) -> Vec<(usize, Vec<f64>)> {
        let shape = &self.shape;
        let all = shape.batch as usize * shape.heads as usize * shape.q_len as usize;
        let row_work = u64::from(shape.k_len) * u64::from(shape.head_dim + shape.value_dim);
        let rows = (WORK / row_work).clamp(2, ROWS).min(all as u64) as usize;
        let numbers = (0..rows).map(|n| n * (all - 1) / (rows - 1).max(1));
        numbers.map(|row| (row, self.exact(row, values))).collect()
    }

    /// A row of the answer.
    fn exact(&self, row: usize, [q, k, v]: &[Vec<f32>; 3]) -> Vec<f64> {
        let shape = &self.shape;
        let (d, dv) = (shape.head_dim as usize, shape.value_dim as usize);
        let (q_len, k_len) = (shape.q_len as usize, shape.k_len as usize);
        let group = (shape.heads / shape.kv_heads) as usize;
        let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        let mask: Vec<bool> = (0..k_len).map(|j| j < k_len - k_len / 4).collect();
        let kv = row / q_len / group * k_len;
        let position = [(row % q_len + k_len) as i64 - q_len as i64];
        let (q, k) = (wide(&q[row * d..][..d]), wide(&k[kv * d..][..k_len * d]));
        let v = wide(&v[kv * dv..][..k_len * dv]);
        let left = shape.window.map_or(-1, i64::from);
        let want = reference::attention(&Attention {
            causal: shape.causal,
            window: (left, -1),
            mask: shape.masked.then_some(&mask[..]),
            offset: Offset::PerRow(&position),
            ..Attention::new([1, 1, 1, d], [1, 1, k_len, dv], &q, &k, &v)
        });
        want.out
    }

    /// Whether what others were held against proved wrong since this was asked: they have to be checked again.
    pub(super) fn take_doubt(&self) -> bool {
        self.doubt.take()
    }

    /// Runs a candidate; or says in what its answer is wrong. Where it differs from what the others agreed on, the
    /// oracle says who is right.
    pub(super) fn check(&self, recording: &Recording) -> Result<std::result::Result<(), String>> {
        // What is not written stays NaN, in every type.
        let bytes = self.out.bytes() as usize / 4 * 4;
        self.gpu.write(&self.out, &vec![0xff; bytes])?;
        self.gpu.run(recording)?;
        let got = self.gpu.read_floats(&self.out)?;
        let dv = self.shape.value_dim as usize;
        let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let wrong = |got: &[f32], row: usize, want: &[f64]| {
            let got = wide(&got[row * dv..][..dv]);
            let off = self.off(got.into_iter(), want.iter().copied());
            off.map(|off| format!("row {row} is off by {off:.1} times what is allowed"))
        };
        let mut wanted = self.wanted.borrow_mut();
        for (row, want) in wanted.iter() {
            if let Some(why) = wrong(&got, *row, want) {
                return Ok(Err(why));
            }
        }
        let mut agreed = self.agreed.borrow_mut();
        let Some(known) = agreed.as_ref() else {
            *agreed = Some(got);
            return Ok(Ok(()));
        };
        // Each may be off from what is right.
        let rows = got.chunks(dv).zip(known.chunks(dv));
        let mut differs = rows.map(|(got, known)| {
            let off = self.off(wide(got).into_iter(), wide(known).into_iter());
            off.is_some_and(|off| off.is_nan() || off > 2.0)
        });
        let Some(row) = differs.position(|differs| differs) else {
            return Ok(Ok(()));
        };
        let want = self.exact(row, &values(&self.shape));
        let (why, is_known_wrong) = (wrong(&got, row, &want), wrong(known, row, &want).is_some());
        wanted.push((row, want));
        if is_known_wrong {
            // Those before this one were held against it.
            self.doubt.set(true);
            *agreed = why.is_none().then_some(got);
        }
        Ok(why.map_or(Ok(()), Err))
    }

    /// How many times what is allowed a row is off, where it is off by more: the rounding of the result,
    /// twice, and the errors of f32 sums, which grow with the square root of their length.
    fn off(
        &self,
        got: impl Iterator<Item = f64>,
        want: impl Iterator<Item = f64> + Clone,
    ) -> Option<f64> {
        let growth = (f64::from(self.shape.k_len) / 1024.0).sqrt().max(1.0);
        let (atol, rtol) = match self.shape.dtype {
            // Subnormals are 2^-24 apart.
            DType::F16 => (2f64.powi(-24), 2f64.powi(-10)),
            DType::BF16 => (0.0, 2f64.powi(-7)),
            _ => (0.0, 0.0),
        };
        let top = want.clone().fold(0f64, |top, x| top.max(x.abs()));
        let allowed = atol + 2e-6 * growth + (rtol + 2e-5 * growth) * top;
        let errors = got
            .zip(want)
            .map(|(got, want)| (got - want).abs() / allowed);
        // NaN is the worst, and stays.
        let worst = errors.fold(0f64, |worst, error| {
            match worst >= error || worst.is_nan() {
                true => worst,
                false => error,
            }
        });
        (worst > 1.0 || worst.is_nan()).then_some(worst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Caps, CoopShape, Matrices};

    #[test]
    fn what_is_wrong_in_other_rows_only_differs_from_the_others() {
        let gpu = Gpu::new()
            .expect("a device: see scripts/with-gpu")
            .untuned();
        let mut job = Job::new(&gpu, &"1,1,1,40,40,8".parse().unwrap()).unwrap();
        let candidate = job.kernels().unwrap()[0];
        let right = job.record(candidate).unwrap();
        let causal = Options {
            causal: true,
            ..Options::default()
        };
        let wrong = job.record_with(candidate, &causal).unwrap();
        let said = job.check(&wrong).unwrap().unwrap_err();
        assert!(said.contains("row 0 is off"), "{said}");
        // The last row sees all keys either way.
        fn last(job: &mut Job) {
            let wanted = job.wanted.get_mut();
            wanted.retain(|(row, _)| *row == 39);
            assert_eq!(wanted.len(), 1);
        }
        last(&mut job);
        assert_eq!(job.check(&right).unwrap(), Ok(()));
        let said = job.check(&wrong).unwrap().unwrap_err();
        assert!(said.contains("row 0 is off"), "{said}");
        assert!(!job.take_doubt());
        // The other way round: what came first is found out, and does not come again.
        *job.agreed.get_mut() = None;
        last(&mut job);
        assert_eq!(job.check(&wrong).unwrap(), Ok(()));
        assert_eq!(job.check(&right).unwrap(), Ok(()));
        assert!(job.take_doubt() && !job.take_doubt());
        assert!(job.check(&wrong).unwrap().is_err());
        assert_eq!(job.check(&right).unwrap(), Ok(()));
        // So it is in a contest.
        *job.agreed.get_mut() = None;
        last(&mut job);
        let mut contest = super::super::Contest::new(job);
        contest.admit(candidate, wrong).unwrap();
        assert_eq!((contest.entries.len(), contest.rejected.len()), (1, 0));
        contest.admit(candidate, right).unwrap();
        assert_eq!((contest.entries.len(), contest.rejected.len()), (1, 1));
        assert!(contest.rejected[0].1.contains("row 0 is off"));
    }

    #[test]
    fn every_candidate_of_many_shapes_answers_right() {
        let gpu = Gpu::new()
            .expect("a device: see scripts/with-gpu")
            .untuned();
        let mut seen = std::collections::BTreeSet::new();
        let mut tried = 0;
        let own = gpu.caps().clone();
        let none = own.without_subgroups();
        // As on a device with workgroup memory of its own.
        let hardware = Caps {
            software: false,
            ..own.clone()
        };
        let matrices = Caps {
            cooperative: vec![CoopShape {
                m: 16,
                n: 16,
                k: 16,
                ab: "f16".into(),
                cr: "f32".into(),
            }],
            matrices: Matrices::Plain,
            ..own.clone()
        };
        let runs = [
            (&own, "1,4,4,40,70,20"),
            (&own, "2,2,2,33,300,40,dv=36,causal"),
            (&own, "1,6,2,9,600,8,window=50,causal"),
            (&own, "1,4,1,1,1100,16"),
            (&own, "1,2,2,70,70,12,masked"),
            (&none, "2,2,2,33,300,40,dv=36,causal"),
            (&none, "1,2,1,2,1100,8"),
            (&hardware, "1,2,2,17,40,20,causal"),
            (&hardware, "1,2,2,17,40,20,causal,f16,f16-math"),
            (&matrices, "1,2,2,70,70,24,f16"),
        ];
        for (caps, text) in runs {
            let gpu = gpu.narrowed(caps.clone());
            let job = Job::new(&gpu, &text.parse().unwrap()).unwrap();
            let mut candidates = job.kernels().unwrap();
            for candidate in candidates.clone() {
                candidates.extend(job.other_splits(candidate).unwrap());
            }
            for candidate in candidates {
                let recording = job.record(candidate).unwrap();
                assert_eq!(
                    job.check(&recording).unwrap(),
                    Ok(()),
                    "{text}: {candidate}"
                );
                let parsed: Candidate = candidate.to_string().parse().unwrap();
                assert_eq!(parsed, candidate);
                seen.insert(candidate.to_string());
                tried += 1;
            }
        }
        println!("{tried} tries of {} candidates", seen.len());
        assert!(seen.len() >= 27, "{seen:?}");
    }
}
