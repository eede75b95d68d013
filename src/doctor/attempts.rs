//! Examinations that ended their process, as the next start finds them.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;

use super::Finding;
use crate::Result;

/// Processes that may end while they examine a power before it counts as wrong: one of them may have been ended by its
/// user.
const ENDED: usize = 2;

/// A file with a line for each examination that is begun, its power, which is taken away when it ends. The file is
/// locked, and the lock goes with its process however that ends: lines that are there under the lock are those of dead
/// processes.
pub(super) struct Attempts(Option<File>);

impl Attempts {
    /// None are kept without a file, where it cannot be written, and while another process is at it.
    pub fn open(path: Option<&Path>) -> Attempts {
        let open = |path: &Path| -> std::io::Result<File> {
            path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            let file = options.open(path)?;
            file.try_lock()?;
            Ok(file)
        };
        let opened = path.map(open).transpose();
        Attempts(opened.unwrap_or_else(|e| {
            tracing::debug!("attempts are not kept: {e}");
            None
        }))
    }

    /// What `examine` finds of a power; or that it is wrong, where too many processes have ended within that.
    pub fn at(
        &mut self,
        power: &str,
        examine: impl FnOnce() -> Result<Finding>,
    ) -> Result<Finding> {
        let text = self.read();
        let is_own = |line: &&str| *line == power;
        let ended = text.lines().filter(is_own).count();
        let found = match ended < ENDED {
            true => {
                self.write(&format!("{text}{power}\n"));
                examine()
            }
            false => Ok(Finding::Wrong(format!(
                "{ended} processes ended while they examined it"
            ))),
        };
        let others = text.lines().filter(|line| !is_own(line));
        self.write(&others.map(|line| format!("{line}\n")).collect::<String>());
        found
    }

    fn read(&mut self) -> String {
        let mut text = String::new();
        if let Some(file) = &mut self.0 {
            let read = file.rewind().and_then(|()| file.read_to_string(&mut text));
            if let Err(e) = read {
                tracing::debug!("attempts are not read: {e}");
            }
        }
        text
    }

    /// Down to the disk, as a driver may take the whole machine along.
    fn write(&mut self, text: &str) {
        let Some(file) = &mut self.0 else {
            return;
        };
        let written = file
            .rewind()
            .and_then(|()| file.set_len(0))
            .and_then(|()| file.write_all(text.as_bytes()))
            .and_then(|()| file.sync_data());
        if let Err(e) = written {
            tracing::debug!("attempts are not written: {e}");
        }
    }
}
