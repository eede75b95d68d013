//! Whether a device's kernels give right answers, and what is not used of it where they do not.
//!
//! [`examine`] runs the routes of attention in every storage type, and matrix products, on small hard problems, each
//! beside the oracle, with the powers and without that make a difference. Its short form runs once for each device and driver, when [`Gpu::choose`] first opens it, on the
//! kernels of powers that drivers have got wrong before: subgroup operations, `f16`, and cooperative matrices.
//! What it found is kept in the user's cache directory, and a power whose kernels were wrong is taken from
//! [`Gpu::caps`], so that no plan uses it; a warning says so. A power whose examination has ended two processes
//! counts as wrong too, until `qkv doctor` looks at it again. In a device of the caller's nothing is run unasked, and
//! its matrices are not used: [`Gpu::self_tested`] asks.

mod attempts;
mod problems;
mod product;
mod tolerance;
mod verdict;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use attempts::Attempts;
pub use problems::Hard;
use problems::Prepared;
pub use tolerance::Tolerance;
pub use verdict::{Finding, Verdict};

use crate::attention::Route;
use crate::gpu::{Caps, DType, Gpu};
use crate::ops;
use crate::{Error, Result};

/// The worst error in units of what is allowed, or what is wrong.
type Outcome = std::result::Result<f64, String>;

/// What a check runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Attention.
    Attention {
        /// The problem.
        hard: Hard,
        /// The route.
        route: Route,
        /// With [`Options::f16_math`](crate::attention::Options::f16_math).
        f16_math: bool,
    },
    /// A matrix product.
    Product,
}

impl Subject {
    /// A word for the problem.
    pub fn problem(self) -> &'static str {
        match self {
            Subject::Attention { hard, .. } => hard.name(),
            Subject::Product => "product",
        }
    }
}

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Subject::Attention {
                hard,
                route,
                f16_math,
            } => {
                let in_f16 = if *f16_math { " in f16" } else { "" };
                write!(f, "{route:?}{in_f16} of `{}`", hard.name())
            }
            Subject::Product => write!(f, "a matrix product"),
        }
    }
}

/// One problem on one route.
#[derive(Clone, Debug)]
pub struct Check {
    /// The problem and the route.
    pub subject: Subject,
    /// How q and out, and k and v, are stored; of a product, both operands and the result.
    pub storage: [DType; 2],
    /// The kernels that ran; none where it did not come to that.
    pub kernels: Vec<&'static str>,
    /// Whether kernels with subgroup operations were to be had.
    pub subgroups: bool,
    /// Whether the products were to be had on cooperative matrices.
    pub matrices: bool,
    /// The worst error in units of what is allowed, or what is wrong.
    pub outcome: Outcome,
    /// What it took, compilers included.
    pub time: Duration,
}

impl Check {
    fn attention(
        gpu: &Gpu,
        hard: Hard,
        storage: [DType; 2],
        (route, f16_math): Form,
        prepared: &Result<Prepared>,
    ) -> Result<Check> {
        let subject = Subject::Attention {
            hard,
            route,
            f16_math,
        };
        Check::new(gpu, subject, storage, || {
            let prepared = prepared.as_ref().map_err(Error::clone)?;
            prepared.run(gpu, route, f16_math)
        })
    }

    fn product(gpu: &Gpu, dtype: DType) -> Result<Check> {
        Check::new(gpu, Subject::Product, [dtype; 2], || {
            let outcome = product::run(gpu, dtype)?;
            let kernel = match dtype == DType::F16 && gpu.caps().matrix_form().is_some() {
                true => "matmul_coop",
                false => "matmul",
            };
            Ok((vec![kernel], outcome))
        })
    }

    fn new(
        gpu: &Gpu,
        subject: Subject,
        storage: [DType; 2],
        run: impl FnOnce() -> Result<(Vec<&'static str>, Outcome)>,
    ) -> Result<Check> {
        let started = Instant::now();
        let (kernels, outcome) = match run() {
            Ok(ran) => ran,
            // No word on the kernels.
            Err(error @ (Error::OutOfMemory(_) | Error::Refused { .. })) => return Err(error),
            Err(error) => (Vec::new(), Err(error.to_string())),
        };
        let caps = gpu.caps();
        let (subgroups, for_matrices) = match subject {
            Subject::Attention { route, .. } => (caps.subgroups.is_some(), route == Route::Prefill),
            Subject::Product => (ops::passes_lanes(caps), true),
        };
        Ok(Check {
            subject,
            storage,
            kernels,
            subgroups,
            matrices: for_matrices && storage == [DType::F16; 2] && caps.matrix_form().is_some(),
            outcome,
            time: started.elapsed(),
        })
    }
}

/// A route, and whether with [`Options::f16_math`](crate::attention::Options::f16_math).
type Form = (Route, bool);

/// What [`examine`] found.
pub struct Report {
    /// The device, without the powers whose kernels are wrong.
    pub gpu: Gpu,
    /// What its driver claims.
    pub claimed: Caps,
    /// Every check.
    pub checks: Vec<Check>,
    /// What kept it from making the rest of them.
    pub ended: Option<Error>,
    /// What follows for the powers.
    pub verdict: Verdict,
}

/// Checks that share what they are stored as.
struct Job {
    storage: [DType; 2],
    /// Problems of attention; none for a matrix product.
    problems: &'static [Hard],
}

const fn job(own: DType, cached: DType, problems: &'static [Hard]) -> Job {
    Job {
        storage: [own, cached],
        problems,
    }
}

/// Problems that are run together where they share their variants. A variant takes a compiler up to seconds, so each
/// storage has those that differ by it.
static JOBS: [Job; 13] = [
    job(DType::F32, DType::F32, &[Hard::Lengths, Hard::Loud]),
    job(DType::F32, DType::F32, &[Hard::Odd]),
    job(DType::F32, DType::F32, &[Hard::Masked]),
    job(DType::F32, DType::F32, &[Hard::Parts]),
    job(DType::F16, DType::F16, &[Hard::Lengths, Hard::Loud]),
    job(DType::F16, DType::F16, &[Hard::Odd]),
    job(DType::F16, DType::F16, &[Hard::Wide]),
    job(DType::BF16, DType::BF16, &[Hard::Lengths, Hard::Loud]),
    job(DType::BF16, DType::BF16, &[Hard::Odd]),
    job(DType::F32, DType::Q8_0, &[Hard::Parts]),
    job(DType::F32, DType::Q4_0, &[Hard::Parts]),
    job(DType::F32, DType::F32, &[]),
    job(DType::F16, DType::F16, &[]),
];
/// Devices that jobs run on at once: compilers are what takes the time.
const DEVICES: usize = 4;

/// Runs the three routes in each of five storage types on those of the problems whose kernels differ by it, and a matrix
/// product in f32 and f16: in f32 with subgroup operations and without, in f16 with cooperative matrices and without,
/// and with products in f16. It does so on the device that [`Gpu::choose`] would take, opened once a processor up to
/// four times, and remembers the verdict. `see` hears of each check as it ends; the report has them in order.
///
/// What loses its device is run again by itself, on a new one, as the loss may be another's doing; if it does so again,
/// the check is wrong and those that were to follow it there are left out.
///
/// # Errors
/// [`Error::NoAdapter`] and [`Error::DeviceLost`] where there is no device to begin with; a wrong answer is none, and
/// what ends it later is [told](Report::ended).
pub fn examine(wanted: Option<&str>, see: &mut dyn FnMut(&Check)) -> Result<Report> {
    // By the table: what was tuned is another question.
    let open = || -> Result<Gpu> {
        let gpu = Gpu::open(wanted)?;
        Ok(gpu.narrowed(gpu.caps().with_matrices()).untuned())
    };
    let mut gpu = open()?;
    let (checks, mut ended) = examine_jobs(&gpu, &open, &examine_job, see);
    let verdict = Verdict::of(&checks);
    let identity = gpu.identity();
    if let Some(folder) = folder() {
        verdict.remember(&folder, &identity);
    }
    known().insert(identity, verdict.clone());
    if gpu.alive().is_err() {
        match open() {
            Ok(new) => gpu = new,
            Err(error) => ended = ended.or(Some(error)),
        }
    }
    Ok(Report {
        claimed: gpu.caps().clone(),
        gpu: verdict.narrow(&gpu),
        checks,
        ended,
        verdict,
    })
}

/// What runs a job on a device and tells of its checks. A lost device ends it, after the check that lost it.
type RunJob<'a> = &'a (dyn Fn(&Gpu, &Job, &mut dyn FnMut(Check)) -> Result<()> + Sync);

/// The checks of all jobs, in order, and what ended them before their end. The first device is `gpu`.
fn examine_jobs(
    gpu: &Gpu,
    open: &(dyn Fn() -> Result<Gpu> + Sync),
    run: RunJob,
    see: &mut dyn FnMut(&Check),
) -> (Vec<Check>, Option<Error>) {
    enum News {
        Found(Check),
        Lost,
        Ended(Error),
    }
    let devices = std::thread::available_parallelism().map_or(1, |n| n.get().min(DEVICES));
    let next = AtomicUsize::new(0);
    let mut found: Vec<(usize, Check)> = Vec::new();
    let (mut lost, mut ended) = (Vec::new(), None);
    std::thread::scope(|scope| {
        let (tell, hear) = mpsc::channel();
        for ix in 0..devices {
            let (tell, next) = (tell.clone(), &next);
            let mut own = (ix == 0).then(|| gpu.clone());
            scope.spawn(move || {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = JOBS.get(at) else {
                        return;
                    };
                    let done = own.take().map_or_else(open, Ok).and_then(|gpu| {
                        run(&gpu, job, &mut |check| {
                            let _ = tell.send((at, News::Found(check)));
                        })?;
                        own = Some(gpu);
                        Ok(())
                    });
                    let _ = match done {
                        Ok(()) => Ok(()),
                        Err(Error::DeviceLost(_)) => tell.send((at, News::Lost)),
                        Err(error) => {
                            // The others end with what they are at.
                            next.store(JOBS.len(), Ordering::Relaxed);
                            tell.send((at, News::Ended(error)))
                        }
                    };
                }
            });
        }
        drop(tell);
        for (at, news) in hear {
            match news {
                News::Found(check) => {
                    see(&check);
                    found.push((at, check));
                }
                News::Lost => lost.push(at),
                News::Ended(error) => ended = ended.take().or(Some(error)),
            }
        }
    });
    // A driver that starts anew may take every device along, not that alone whose kernel is to blame.
    found.retain(|(at, _)| !lost.contains(at));
    for at in lost {
        let done = open().map(|gpu| {
            run(&gpu, &JOBS[at], &mut |check| {
                see(&check);
                found.push((at, check));
            })
        });
        match done {
            Ok(Ok(()) | Err(Error::DeviceLost(_))) => {}
            Ok(Err(error)) | Err(error) => {
                ended = ended.or(Some(error));
                break;
            }
        }
    }
    found.sort_by_key(|&(at, _)| at);
    (found.into_iter().map(|(_, check)| check).collect(), ended)
}

/// Every route on some problems, or a product, with those powers and without that make a difference there.
fn examine_job(gpu: &Gpu, job: &Job, see: &mut dyn FnMut(Check)) -> Result<()> {
    let &Job { storage, problems } = job;
    let claimed = gpu.caps();
    let f16 = storage == [DType::F16; 2];
    if f16 && !claimed.f16 {
        return Ok(());
    }
    // What stands in for a power is looked at where that power's kernels are; the three passes have none to do without,
    // and where subgroup operations are right, what stands in for them is not what runs.
    let mut forms = vec![(gpu.clone(), ALL.as_slice())];
    if claimed.subgroups.is_some() && storage == [DType::F32; 2] {
        forms.push((gpu.narrowed(claimed.without_subgroups()), &ALL[1..]));
    }
    let without_matrices = gpu.narrowed(claimed.without_matrices());
    if f16 && claimed.matrix_form().is_some() {
        forms.push((without_matrices.clone(), &ALL[1..2]));
    }
    if problems.is_empty() {
        for (gpu, _) in &forms {
            see(Check::product(gpu, storage[0])?);
            not_lost(gpu)?;
        }
        return Ok(());
    }
    if f16 {
        forms.push((without_matrices, &[IN_F16]));
    }
    for &hard in problems {
        let prepared = Prepared::new(gpu, hard, storage);
        for (gpu, routes) in &forms {
            for &form in *routes {
                see(Check::attention(gpu, hard, storage, form, &prepared)?);
                not_lost(gpu)?;
            }
        }
    }
    Ok(())
}

/// The routes, the fused ones last.
const ALL: [Form; 3] = [
    (Route::ThreePass, false),
    (Route::Prefill, false),
    (Route::Decode, false),
];
/// The one that multiplies in f16.
const IN_F16: Form = (Route::Prefill, true);

fn not_lost(gpu: &Gpu) -> Result<()> {
    match gpu.alive() {
        Err(error @ Error::DeviceLost(_)) => Err(error),
        // What else the device told counts for the check that it told it in.
        _ => Ok(()),
    }
}

/// What is known to go wrong on such a device and is kept from happening, a line each.
pub fn avoided(caps: &Caps) -> Vec<&'static str> {
    match caps.software {
        true => vec![
            "Mesa's software driver before 25 ends every loop, without a word, once a thread has taken 65,535 \
             turns in all: plans keep threads below that, and refuse what cannot be cut",
            "it unrolls loops of known length and loops over arrays of at most 32 elements, and compiles for \
             seconds: kernels hide their lengths",
        ],
        false => Vec::new(),
    }
}

/// The short form: each power's kernels on two problems that share their variants, few and small ones, as
/// this is somebody's first start. What is found of each power is remembered at once, as the next may end the
/// process.
fn judge(
    gpu: &Gpu,
    verdict: &mut Verdict,
    attempts: &mut Attempts,
    remember: &dyn Fn(&Verdict),
) -> Result<()> {
    // One wrong one is enough, and may have cost the device.
    let right = |checks: &[Check]| checks.iter().all(|check| check.outcome.is_ok());
    let run = |gpu: &Gpu, dtype, problems: [Hard; 2], forms: &[Form]| -> Result<Vec<Check>> {
        let mut checks = Vec::new();
        for hard in problems {
            let storage = [dtype; 2];
            let prepared = Ok(Prepared::new(gpu, hard, storage)?);
            for &form in forms {
                checks.push(Check::attention(gpu, hard, storage, form, &prepared)?);
                if !right(&checks) {
                    return Ok(checks);
                }
            }
        }
        Ok(checks)
    };
    let claimed = gpu.caps();
    let small = [Hard::Lengths, Hard::Loud];
    if claimed.subgroups.is_some() && verdict.subgroups == Finding::Unknown {
        let gpu = gpu.narrowed(claimed.without_f16()).untuned();
        verdict.subgroups = attempts.at("subgroups", || {
            let mut checks = run(&gpu, DType::F32, small, &ALL[1..])?;
            if right(&checks) && ops::passes_lanes(gpu.caps()) {
                checks.push(Check::product(&gpu, DType::F32)?);
            }
            Ok(Verdict::of(&checks).subgroups)
        })?;
        remember(verdict);
        gpu.alive()?;
    }
    if claimed.f16 && verdict.f16 == Finding::Unknown {
        let gpu = gpu.narrowed(verdict.left(claimed)).untuned();
        // What loads and stores it is the same text in every fused kernel.
        verdict.f16 = attempts.at("f16", || {
            let checks = run(&gpu, DType::F16, small, &[ALL[0], ALL[2]])?;
            Ok(Verdict::of(&checks).f16)
        })?;
        remember(verdict);
        gpu.alive()?;
    }
    if verdict.left(claimed).f16_math && verdict.f16_math == Finding::Unknown {
        let left = verdict.left(claimed).without_matrices();
        let gpu = gpu.narrowed(left).untuned();
        verdict.f16_math = attempts.at("f16_math", || {
            let checks = run(&gpu, DType::F16, small, &[IN_F16])?;
            Ok(Verdict::of(&checks).f16_math)
        })?;
        remember(verdict);
        gpu.alive()?;
    }
    let left = verdict.left(claimed).with_matrices();
    if left.matrix_form().is_some() && verdict.matrices == Finding::Unknown {
        let gpu = gpu.narrowed(left).untuned();
        verdict.matrices = attempts.at("cooperative matrices", || {
            let problems = [Hard::Wide, Hard::Loud];
            let mut checks = run(&gpu, DType::F16, problems, &ALL[1..2])?;
            if right(&checks) {
                checks.push(Check::product(&gpu, DType::F16)?);
            }
            Ok(Verdict::of(&checks).matrices)
        })?;
        remember(verdict);
    }
    Ok(())
}

/// What is known of the device: remembered, or else found now and remembered.
fn consult(gpu: &Gpu, folder: Option<&Path>) -> Verdict {
    let identity = gpu.identity();
    let remembered = folder.and_then(|folder| Verdict::recall(folder, &identity));
    let mut verdict = remembered.unwrap_or_default();
    if verdict.covers(gpu.caps()) {
        return verdict;
    }
    let started = Instant::now();
    let path = folder.map(|folder| verdict::attempts_path(folder, &identity));
    let mut attempts = Attempts::open(path.as_deref());
    let remember = |verdict: &Verdict| {
        if let Some(folder) = folder {
            verdict.remember(folder, &identity);
        }
    };
    if let Err(error) = judge(gpu, &mut verdict, &mut attempts, &remember) {
        tracing::debug!("the device was not examined to the end: {error}");
    }
    let ms = started.elapsed().as_secs_f64() * 1e3;
    tracing::debug!(ms, ?verdict, "examined");
    verdict
}

/// Where verdicts are kept.
fn folder() -> Option<PathBuf> {
    Some(dirs::cache_dir()?.join("qkv"))
}

/// Verdicts of this process by device, so that without a cache directory too each is examined once.
fn known() -> MutexGuard<'static, BTreeMap<String, Verdict>> {
    static KNOWN: Mutex<BTreeMap<String, Verdict>> = Mutex::new(BTreeMap::new());
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The verdict on a device, of which the file is asked once a process. Threads that ask at once wait for the
/// first.
fn verdict(gpu: &Gpu) -> Verdict {
    let mut known = known();
    let identity = gpu.identity();
    let verdict = known.get(&identity).cloned().unwrap_or_default();
    if verdict.covers(gpu.caps()) {
        return verdict;
    }
    let verdict = consult(gpu, folder().as_deref());
    known.insert(identity, verdict.clone());
    verdict
}

impl Gpu {
    /// The best device of this machine, or the one the environment names (see
    /// [`crate::gpu::DEVICE_VARIABLE`]), as [`Gpu::choose`] opens it.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] where there is none.
    pub fn new() -> Result<Gpu> {
        Gpu::choose(None)
    }

    /// A device by number or by a part of its name, as `qkv devices` lists them; `None` takes the best.
    /// At a device's first use with its driver some of its kernels are [examined](crate::doctor), which takes
    /// a second or so; powers whose kernels were wrong are not used.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] where there is none, or none of that number or name; [`Error::DeviceLost`] where it is
    /// lost each time that it is opened.
    pub fn choose(wanted: Option<&str>) -> Result<Gpu> {
        let mut gpu = Gpu::open(wanted)?;
        let mut found = verdict(&gpu);
        // A wrong kernel may cost the device: the next one does without it, and so on for each power.
        for _ in 0..3 {
            if gpu.alive().is_ok() {
                break;
            }
            gpu = Gpu::open(wanted)?;
            found = verdict(&gpu);
        }
        gpu.alive()?;
        found.warn(gpu.caps());
        Ok(found.narrow(&gpu))
    }

    /// The same device without those powers whose kernels give wrong answers on it, for devices of the
    /// caller's: what [`Gpu::choose`] does with its own. Submits and waits, unless the answer is remembered.
    pub fn self_tested(&self) -> Gpu {
        let found = verdict(self);
        found.warn(self.caps());
        found.narrow(self)
    }
}

#[cfg(test)]
mod tests;
