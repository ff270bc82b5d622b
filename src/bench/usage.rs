//! What a process uses: time, processor time and memory.

use std::time::Instant;

use serde::Serialize;

/// A point in time, and the processor time used until then.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    wall: Instant,
    cpu_s: Option<f64>,
}

impl Moment {
    /// This moment.
    pub fn now() -> Self {
        Self {
            wall: Instant::now(),
            cpu_s: cpu_s(),
        }
    }

    /// The start of the process; to be called first thing in it. Processor time counts from its very beginning.
    pub fn process_start() -> Self {
        Self {
            wall: Instant::now(),
            cpu_s: cpu_s().map(|_| 0.0),
        }
    }

    /// What was used between this moment and now.
    pub fn elapsed(&self) -> Spent {
        let now = Self::now();
        Spent {
            wall_s: (now.wall - self.wall).as_secs_f64(),
            cpu_s: now.cpu_s.zip(self.cpu_s).map(|(now, then)| now - then),
        }
    }
}

/// Time that was used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spent {
    /// Seconds on the clock.
    pub wall_s: f64,
    /// Seconds of all threads together, user and system; `None` where the system does not tell.
    pub cpu_s: Option<f64>,
}

impl Spent {
    /// Without a part of it.
    #[must_use]
    pub fn without(self, part: Self) -> Self {
        Self {
            wall_s: self.wall_s - part.wall_s,
            cpu_s: self.cpu_s.zip(part.cpu_s).map(|(all, part)| all - part),
        }
    }
}

/// Processor time of this process so far, in seconds.
#[cfg(unix)]
fn cpu_s() -> Option<f64> {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Some(time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9)
}

#[cfg(not(unix))]
fn cpu_s() -> Option<f64> {
    None
}

/// The most memory that this process has had in RAM at once, in bytes; `None` where the system does not tell.
pub fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    high_water_mark_bytes(&status)
}

/// `VmHWM` of Linux' `/proc/PID/status`.
fn high_water_mark_bytes(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_high_water_mark_is_found_among_other_lines() {
        let status = "Name:\tlorasmith\nVmPeak:\t  900 kB\nVmHWM:\t    1234 kB\nVmRSS:\t 1 kB\n";
        assert_eq!(high_water_mark_bytes(status), Some(1234 * 1024));
        assert_eq!(high_water_mark_bytes("VmHWM:\t1 MB\n"), None);
        assert_eq!(high_water_mark_bytes(""), None);
    }

    #[cfg(unix)]
    #[test]
    fn work_costs_processor_time() {
        let start = Moment::now();
        let mut sum = 0_u64;
        while start.elapsed().cpu_s.unwrap() < 0.02 {
            sum = std::hint::black_box(sum + 1);
        }
        let part = Spent {
            wall_s: 0.0,
            cpu_s: Some(0.02),
        };
        let left = start.elapsed().without(part);
        assert!(left.cpu_s.unwrap() >= 0.0 && left.wall_s > 0.0);
    }
}
