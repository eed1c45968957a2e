//! Kicks a vCPU that does not come back, so that a bug fails a test instead of hanging it.

use hypervisor::Kicker;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Far beyond what any test needs, on a busy machine too.
const LIMIT: Duration = Duration::from_secs(180);

struct Watch {
    until: Instant,
    kickers: Vec<Kicker>,
    barked: Arc<AtomicBool>,
}

fn list() -> &'static Mutex<Vec<Watch>> {
    static LIST: OnceLock<Mutex<Vec<Watch>>> = OnceLock::new();
    LIST.get_or_init(|| {
        std::thread::spawn(|| {
            loop {
                std::thread::sleep(Duration::from_millis(500));
                for watch in list().lock().unwrap().iter().filter(|w| w.until < Instant::now()) {
                    watch.barked.store(true, SeqCst);
                    watch.kickers.iter().for_each(Kicker::kick);
                }
            }
        });
        Mutex::new(Vec::new())
    })
}

/// Watches until it is dropped.
pub struct Watchdog(Arc<AtomicBool>);

impl Watchdog {
    pub fn start(kickers: Vec<Kicker>) -> Self {
        let barked = Arc::new(AtomicBool::new(false));
        let watch = Watch { until: Instant::now() + LIMIT, kickers, barked: barked.clone() };
        list().lock().unwrap().push(watch);
        Self(barked)
    }
    /// Whether it had to kick.
    pub fn barked(&self) -> bool {
        self.0.load(SeqCst)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        list().lock().unwrap().retain(|w| !Arc::ptr_eq(&w.barked, &self.0));
    }
}
