//! How long the device takes for a recording.

use std::time::{Duration, Instant};

use super::{Gpu, Recording};
use crate::Result;

impl Gpu {
    /// Runs a recording, waits for its end and answers how long it took: on the device's own clock, from
    /// the beginning of its first dispatch to the end of its last one, where [`super::Caps::timestamps`]
    /// says that there is one; else on the host's, from the submission to the end.
    pub fn time(&self, recording: &Recording) -> Result<Duration> {
        if !self.caps().timestamps || recording.dispatches() == 0 {
            let started = Instant::now();
            self.run(recording)?;
            return Ok(started.elapsed());
        }
        let queries = self.checked("timestamps", || {
            self.device().create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("timestamps"),
                ty: wgpu::QueryType::Timestamp,
                count: 2,
            })
        })?;
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let resolved = self.buffer("timestamps", 16, usage, None)?;
        let staging = self.staging(16)?;
        let mut encoder = self.device().create_command_encoder(&Default::default());
        recording.encode_timed(&mut encoder, Some(&queries));
        encoder.resolve_query_set(&queries, 0..2, &resolved, 0);
        encoder.copy_buffer_to_buffer(&resolved, 0, staging.buffer(), 0, 16);
        let index = self.submit_encoder(encoder)?;
        let [from, to] = self.read_staging(index, &staging, |bytes| {
            bytemuck::pod_read_unaligned::<[u64; 2]>(&bytes[..16])
        })?;
        let tick = f64::from(self.queue().get_timestamp_period());
        let nanoseconds = to.saturating_sub(from) as f64 * tick;
        Ok(Duration::from_nanos(nanoseconds as u64))
    }
}
