//! The device of the tests.

use std::sync::Mutex;

use qkv::gpu::Gpu;

/// A device that no other test holds at this time: what runs on one device is compiled and computed there one after
/// another, so that tests on devices of their own take half the time on two processors. It goes to another test
/// when this thread ends.
pub fn gpu() -> &'static Gpu {
    LEASE.with(|lease| lease.0)
}

struct Lease(&'static Gpu);

static FREE: Mutex<Vec<&'static Gpu>> = Mutex::new(Vec::new());

thread_local! {
    static LEASE: Lease = {
        let free = FREE.lock().unwrap().pop();
        Lease(free.unwrap_or_else(|| Box::leak(Box::new(open()))))
    };
}

impl Drop for Lease {
    fn drop(&mut self) {
        FREE.lock().unwrap().push(self.0);
    }
}

fn open() -> Gpu {
    Gpu::new()
        .expect("a device: see scripts/with-gpu")
        .untuned()
}
