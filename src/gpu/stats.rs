//! What the engine has made on the device so far: the steady state is asserted with these.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub buffers: AtomicU64,
    pub pipelines: AtomicU64,
    pub bind_groups: AtomicU64,
    pub submits: AtomicU64,
    bytes: AtomicU64,
    peak: AtomicU64,
}

/// A snapshot of what was made on the device since the `Gpu` was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Buffers created.
    pub buffers: u64,
    /// Pipelines compiled.
    pub pipelines: u64,
    /// Bind groups created.
    pub bind_groups: u64,
    /// Submissions to the queue.
    pub submits: u64,
    /// Bytes in buffers of ours now.
    pub bytes: u64,
    /// The most bytes that there were at once.
    pub peak_bytes: u64,
}

impl Stats {
    pub fn allocated(&self, bytes: u64) {
        self.buffers.fetch_add(1, Relaxed);
        let now = self.bytes.fetch_add(bytes, Relaxed) + bytes;
        self.peak.fetch_max(now, Relaxed);
    }

    pub fn freed(&self, bytes: u64) {
        self.bytes.fetch_sub(bytes, Relaxed);
    }

    pub fn snapshot(&self) -> Counters {
        Counters {
            buffers: self.buffers.load(Relaxed),
            pipelines: self.pipelines.load(Relaxed),
            bind_groups: self.bind_groups.load(Relaxed),
            submits: self.submits.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            peak_bytes: self.peak.load(Relaxed),
        }
    }
}
