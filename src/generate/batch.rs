//! Continuous batching (Orca, Yu et al. 2022): requests join and leave between steps, which mix chunks of prompts
//! with single tokens.

use std::collections::VecDeque;

use super::causal::{refuse_grown, seen};
use super::{CausalSettings, Sequence, read_choices};
use crate::cache::{Keep, PagedCache, SequenceId};
use crate::gpu::{DType, Recorder, Tensor};
use crate::model::CausalModel;
use crate::ops::{self, Draw};
use crate::{Error, Result};

/// What a batch may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchSettings {
    /// Pages of the cache, which all sequences share.
    pub pages: u32,
    /// Positions of a page.
    pub page_len: u32,
    /// How keys and values are stored.
    pub types: [DType; 2],
    /// The most tokens that a step computes.
    pub budget: u32,
    /// The most sequences that run at a time; the others wait. A smaller budget, or fewer pages, bound them too.
    pub max_sequences: u32,
    /// Whether keys that sequences share are read once for all of them: [`CausalModel::cascade_step`]. What is written
    /// for a prompt may then depend on what stands beside it, by rounding.
    pub cascade: bool,
}

/// A request of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(u64);

/// What a step brings.
#[derive(Clone, Debug)]
pub enum Event {
    /// A token is written.
    Token {
        /// For this request.
        request: RequestId,
        /// The token.
        token: u32,
        /// The logarithm of its probability.
        logprob: f32,
    },
    /// A text has ended: by an end token, or as long as it may be.
    Finished {
        /// This request's.
        request: RequestId,
        /// All of it; the score is the sum of log-probabilities.
        sequence: Sequence,
    },
    /// A request cannot be honoured; the others go on.
    Failed {
        /// This one.
        request: RequestId,
        /// Why.
        error: Error,
    },
}

struct Request {
    id: RequestId,
    /// The prompt and what is written behind it.
    text: Vec<u32>,
    prompt: usize,
    score: f32,
    settings: CausalSettings,
}

impl Request {
    fn written(&self) -> Sequence {
        Sequence {
            tokens: self.text[self.prompt..].to_vec(),
            score: self.score,
        }
    }
}

struct Running {
    request: Request,
    cached: SequenceId,
    /// Tokens that the step at hand computes.
    new: u32,
}

/// Goes on with any number of prompts at once, each by its own settings. First come, first served: each step takes a
/// token of every running sequence, and fills its budget with chunks of prompts. Where pages run out, the youngest
/// sequence gives its own up and is computed anew later. What is written for a prompt is the same, bit for bit,
/// whatever stands beside it, unless [`BatchSettings::cascade`] is set.
pub struct Batch<'m> {
    model: &'m CausalModel,
    settings: BatchSettings,
    keep: Keep,
    cache: PagedCache,
    next: u64,
    /// Front first.
    waiting: VecDeque<Request>,
    /// By age: whoever waits is younger.
    running: Vec<Running>,
    /// Those that can never fit.
    refused: Vec<(RequestId, Error)>,
    preemptions: u64,
    computed: u64,
    /// f32 `[most sequences, V]`
    logits: Tensor,
    /// What each row is drawn by. u32 `[most sequences, 8]`
    rules: Tensor,
    /// A bit for each token of each row's text; only penalties ask for them. u32 `[most sequences, V / 32]`
    seen: Tensor,
    /// u32 `[most sequences, 1, 2]`
    chosen: Tensor,
    /// Where the choice goes that the next step takes from the host.
    ids: Tensor,
    staging: Tensor,
}

impl<'m> Batch<'m> {
    /// An empty batch with its cache.
    ///
    /// # Errors
    /// [`Error::Refused`] for settings of zero, for types that the model's heads do not fit, and for more positions
    /// than those where the model's rotary base begins to grow; [`Error::OutOfMemory`] where the cache does not fit.
    pub fn new(model: &'m CausalModel, settings: BatchSettings) -> Result<Self> {
        let (gpu, spec) = (model.gpu(), model.spec());
        for (name, value) in [
            ("budget", settings.budget),
            ("max_sequences", settings.max_sequences),
        ] {
            if value == 0 {
                return Err(Error::refused(name, value, "at least 1"));
            }
        }
        let positions = u64::from(settings.pages) * u64::from(settings.page_len);
        refuse_grown(model, "the positions of all pages", positions)?;
        let cache = model.paged_cache(settings.types, settings.pages, settings.page_len)?;
        // A sequence that runs holds a page, and takes a row of every step.
        let most = settings
            .max_sequences
            .min(settings.budget)
            .min(settings.pages);
        let words = spec.vocab.div_ceil(32);
        Ok(Batch {
            keep: Keep {
                window: window(model),
                first: 0,
            },
            cache,
            next: 0,
            waiting: VecDeque::new(),
            running: Vec::new(),
            refused: Vec::new(),
            preemptions: 0,
            computed: 0,
            logits: gpu.empty("logits", DType::F32, &[most, spec.vocab])?,
            rules: gpu.empty("rules", DType::U32, &[most, 8])?,
            seen: gpu.empty("seen", DType::U32, &[most, words])?,
            chosen: gpu.empty("chosen", DType::U32, &[most, 1, 2])?,
            ids: gpu.empty("ids", DType::U32, &[most])?,
            staging: gpu.staging(u64::from(most) * 8)?,
            model,
            settings: BatchSettings {
                max_sequences: most,
                ..settings
            },
        })
    }

    /// A batch with pages for as many of these texts as may run at a time, counted in positions; fewer, down to
    /// what the longest takes, where the settings or the device's memory have fewer.
    ///
    /// # Errors
    /// As [`Batch::new`]; [`Error::Refused`] for a text that the device cannot hold.
    pub fn for_texts(
        model: &'m CausalModel,
        settings: BatchSettings,
        positions: &[u32],
    ) -> Result<Self> {
        if settings.page_len == 0 {
            return Err(Error::refused("page_len", 0, "at least 1"));
        }
        let window = window(model);
        let pages_of = |&n: &u32| pages_of(u64::from(n), &settings, window);
        let mut needs: Vec<u64> = positions.iter().map(pages_of).collect();
        needs.sort_unstable_by_key(|&n| std::cmp::Reverse(n));
        let longest = needs.first().map_or(1, |&n| n.max(1));
        let wanted = needs.iter().take(settings.max_sequences as usize).sum();
        // What a kernel may bind of a layer.
        let heads = model.spec().heads;
        let page = settings.types.map(|dtype| {
            let bytes = dtype.bytes(&[heads.kv_heads, settings.page_len, heads.head_dim]);
            model.gpu().caps().max_binding / bytes.max(1)
        });
        // And what a rotary base that grows with the cache leaves.
        let spec = model.spec();
        let steady = match spec.steady_positions() {
            steady if steady < spec.max_positions => steady / settings.page_len,
            _ => u32::MAX,
        };
        let most = page[0].min(page[1]).min(steady.min(settings.pages).into());
        if longest > most {
            let n = positions.iter().max().copied().unwrap_or(0);
            let page_len = settings.page_len;
            let bound = format!("it takes {longest} pages of {page_len}, and there may be {most}");
            return Err(Error::refused("a text's positions", n, bound));
        }
        let mut pages = u64::max(wanted, longest).min(most);
        loop {
            let made = Batch::new(
                model,
                BatchSettings {
                    pages: pages as u32,
                    ..settings
                },
            );
            match made {
                Err(Error::OutOfMemory(_)) if pages > longest => pages = longest.max(pages / 2),
                made => return made,
            }
        }
    }

    /// Queues a prompt behind those that are there. What is wrong with it, if anything, the next step says: see
    /// [`Event::Failed`].
    pub fn add(&mut self, prompt: &[u32], settings: &CausalSettings) -> RequestId {
        let id = RequestId(self.next);
        self.next += 1;
        match self.check(prompt, settings) {
            Ok(()) => self.waiting.push_back(Request {
                id,
                text: prompt.to_vec(),
                prompt: prompt.len(),
                score: 0.0,
                settings: settings.clone(),
            }),
            Err(error) => self.refused.push((id, error)),
        }
        id
    }

    /// Whether a request fits if it is alone; then it is done one day.
    fn check(&self, prompt: &[u32], settings: &CausalSettings) -> Result<()> {
        let spec = self.model.spec();
        settings.check(spec.vocab)?;
        if prompt.is_empty() {
            return Err(Error::refused("a prompt", "empty", "a token at least"));
        }
        if let Some(id) = prompt.iter().find(|&&id| id >= spec.vocab) {
            let bound = format!("the vocabulary has {} tokens", spec.vocab);
            return Err(Error::refused("a prompt's token", id, bound));
        }
        // The last token is written nowhere.
        let total = prompt.len() as u64 + u64::from(settings.max_tokens) - 1;
        let what = "a prompt and max_tokens";
        if total > u64::from(spec.max_positions) {
            let bound = format!("the model has {} positions", spec.max_positions);
            return Err(Error::refused(what, total, bound));
        }
        let (needs, pages) = (self.pages_of(total), self.settings.pages);
        if needs > u64::from(pages) {
            let bound = format!("they take {needs} pages, and the pool has {pages}");
            return Err(Error::refused(what, total, bound));
        }
        Ok(())
    }

    /// The most pages that a text of so many positions holds at a time.
    fn pages_of(&self, positions: u64) -> u64 {
        pages_of(positions, &self.settings, self.keep.window)
    }

    /// Ends a request before its end; the answer is what is written so far, or none where it is answered already or
    /// refused: then nothing more is said of it.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub fn cancel(&mut self, id: RequestId) -> Result<Option<Sequence>> {
        if let Some(at) = self.running.iter().position(|row| row.request.id == id) {
            let row = self.running.remove(at);
            self.cache.remove(row.cached)?;
            return Ok(Some(row.request.written()));
        }
        self.refused.retain(|&(refused, _)| refused != id);
        let at = self.waiting.iter().position(|request| request.id == id);
        let request = at.and_then(|at| self.waiting.remove(at));
        Ok(request.map(|request| request.written()))
    }

    /// Whether all requests are answered.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.refused.is_empty()
    }

    /// How often a sequence has given its pages up for others.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Tokens that all steps have computed: those of preempted sequences again, those of shared beginnings once.
    pub fn computed(&self) -> u64 {
        self.computed
    }

    /// The cache, for its accounts.
    pub fn cache(&self) -> &PagedCache {
        &self.cache
    }

    /// One step: one encoder, one submission, and a few bytes back. Without running or waiting requests it does
    /// nothing.
    ///
    /// # Errors
    /// What the device answers. No request is lost: all that ran wait again, to be computed anew.
    pub fn step(&mut self) -> Result<Vec<Event>> {
        let refused = std::mem::take(&mut self.refused);
        let failed = |(request, error)| Event::Failed { request, error };
        let mut events: Vec<Event> = refused.into_iter().map(failed).collect();
        if self.waiting.is_empty() && self.running.is_empty() {
            return Ok(events);
        }
        match self.advance(&mut events) {
            Ok(()) => Ok(events),
            Err(error) => {
                // What was to be computed may not be there.
                while !self.running.is_empty() {
                    self.suspend()?;
                }
                for event in events {
                    if let Event::Failed { request, error } = event {
                        self.refused.push((request, error));
                    }
                }
                Err(error)
            }
        }
    }

    /// The youngest running sequence waits again, before all others.
    fn suspend(&mut self) -> Result<()> {
        if let Some(Running {
            request, cached, ..
        }) = self.running.pop()
        {
            self.waiting.push_front(request);
            self.cache.remove(cached)?;
        }
        Ok(())
    }

    /// Says how many tokens of each sequence the step computes, and makes room for them.
    fn schedule(&mut self, recorder: &mut Recorder) -> Result<()> {
        let mut todo = Vec::with_capacity(self.running.len());
        for running in &self.running {
            let done = self.cache.len(running.cached)?;
            todo.push(running.request.text.len() as u32 - done);
        }
        // Single tokens first, then chunks, by age.
        let singles = todo.iter().filter(|&&n| n == 1).count() as u32;
        let mut left = self.settings.budget - singles;
        for n in todo.iter_mut().filter(|n| **n > 1) {
            *n = left.min(*n);
            left -= *n;
        }
        let before = self.preemptions;
        let mut at = 0;
        while at < self.running.len() {
            let running = &mut self.running[at];
            running.new = todo[at];
            let done = self.cache.len(running.cached)? as usize;
            let tokens = &running.request.text[done..done + running.new as usize];
            match self.cache.append(recorder, running.cached, tokens) {
                Ok(()) => at += 1,
                // Those after it have taken nothing in this step.
                Err(Error::OutOfMemory(_)) if self.running.len() > 1 => {
                    self.suspend()?;
                    self.preemptions += 1;
                }
                Err(error) => return Err(error),
            }
        }
        if self.preemptions > before {
            return Ok(());
        }
        while left > 0 && (self.running.len() as u32) < self.settings.max_sequences {
            let Some(request) = self.waiting.pop_front() else {
                break;
            };
            let cached = self.cache.start(&request.text, self.keep);
            let done = self.cache.len(cached)?;
            let shared = u64::from(done / self.settings.page_len);
            // Room for all of its text, or it would soon give up what it has.
            let needs = self.pages_of(request.text.len() as u64);
            if needs.saturating_sub(shared) > u64::from(self.cache.free_pages()) {
                self.cache.remove(cached)?;
                self.waiting.push_front(request);
                break;
            }
            let n = left.min(request.text.len() as u32 - done);
            let tokens = &request.text[done as usize..][..n as usize];
            let appended = self.cache.append(recorder, cached, tokens);
            self.running.push(Running {
                request,
                cached,
                new: n,
            });
            appended?;
            left -= n;
        }
        Ok(())
    }

    fn advance(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let (gpu, vocab) = (self.model.gpu(), self.model.spec().vocab);
        let mut recorder = Recorder::new(gpu);
        self.schedule(&mut recorder)?;
        let rows: Vec<&Running> = self.running.iter().filter(|row| row.new > 0).collect();
        let n = rows.len() as u32;
        let logits = self.logits.reshape_prefix(&[n, vocab]);
        let chosen = self.chosen.reshape_prefix(&[n, 1, 2]);
        let new: Vec<(SequenceId, u32)> = rows.iter().map(|row| (row.cached, row.new)).collect();
        let step = match self.settings.cascade {
            true => self.model.cascade_step(&self.cache, &new)?,
            false => self.model.paged_step(&self.cache, &new)?,
        };
        self.model
            .record_paged_step(&mut recorder, &self.cache, &step, &logits)?;
        self.write_rules(&rows)?;
        let settings = rows.iter().map(|row| &row.request.settings.sampling);
        let draw = Draw {
            logits: &logits,
            rules: &self.rules,
            seen: &self.seen,
            lengths: step.lengths(),
            chosen: &chosen,
            ids: &self.ids,
            top_k: settings.clone().any(|sampling| sampling.top_k > 0),
            top_p: settings.clone().any(|sampling| sampling.top_p < 1.0),
        };
        ops::sample(&mut recorder, draw)?;
        recorder.copy(&chosen, self.staging.buffer(), 0);
        let recording = recorder.finish()?;
        let read = |bytes: &[u8]| read_choices(bytes, 1, vocab);
        let choices = gpu.run_and_read(&recording, &self.staging, read)?;

        self.computed += new.iter().map(|&(_, n)| u64::from(n)).sum::<u64>();
        let mut choices = choices.into_iter();
        let mut running = Vec::with_capacity(self.running.len());
        for mut row in std::mem::take(&mut self.running) {
            let choice = (row.new > 0).then(|| choices.next()).flatten();
            let (request, cached) = (&mut row.request, row.cached);
            let whole = self.cache.len(cached)? as usize == request.text.len();
            let Some(choice) = choice.filter(|_| whole) else {
                // Its prompt is not read to the end yet.
                running.push(row);
                continue;
            };
            let id = request.id;
            let Some(&(token, logprob)) = choice.first().filter(|(_, p)| p.is_finite()) else {
                self.cache.remove(cached)?;
                let n = request.text.len() - request.prompt + 1;
                let error = Error::Device(format!("token {n}: the logits are not finite"));
                events.push(Event::Failed { request: id, error });
                continue;
            };
            request.text.push(token);
            request.score += logprob;
            events.push(Event::Token {
                request: id,
                token,
                logprob,
            });
            let written = request.text.len() - request.prompt;
            if written == request.settings.max_tokens as usize
                || request.settings.eos.contains(&token)
            {
                self.cache.remove(cached)?;
                events.push(Event::Finished {
                    request: id,
                    sequence: request.written(),
                });
            } else {
                running.push(row);
            }
        }
        self.running = running;
        Ok(())
    }

    /// Writes what each row of a step is drawn by.
    fn write_rules(&self, rows: &[&Running]) -> Result<()> {
        let gpu = self.model.gpu();
        let rules = rows.iter().map(|row| &row.request.settings);
        let rules: Vec<u32> = rules
            .flat_map(|settings| settings.sampling.rules(settings.seed))
            .collect();
        gpu.write(&self.rules, bytemuck::cast_slice(&rules))?;
        let penalised = |row: &&Running| row.request.settings.sampling.repeat_penalty != 1.0;
        if !rows.iter().any(penalised) {
            return Ok(());
        }
        let texts: Vec<&[u32]> = rows.iter().map(|row| &row.request.text[..]).collect();
        let seen = seen(&texts, self.model.spec().vocab);
        gpu.write(&self.seen, bytemuck::cast_slice(&seen))
    }
}

/// The most keys that any layer sees, if none sees all: only what no layer sees any more may go.
fn window(model: &CausalModel) -> Option<u32> {
    let windows: Option<Vec<u32>> = model.spec().windows.iter().copied().collect();
    windows.and_then(|windows| windows.into_iter().max())
}

/// The most pages that a text of so many positions holds at a time.
fn pages_of(positions: u64, settings: &BatchSettings, window: Option<u32>) -> u64 {
    let page_len = u64::from(settings.page_len);
    let whole = positions.div_ceil(page_len);
    match window {
        // A chunk and the window before it, anywhere in their pages.
        Some(window) => {
            let seen = u64::from(window) - 1 + u64::from(settings.budget);
            whole.min(seen.div_ceil(page_len) + 1)
        }
        None => whole,
    }
}
