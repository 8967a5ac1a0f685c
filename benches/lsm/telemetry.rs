//! Telemetry as plants send it: one JSON object of about 200 bytes a message.
//!
//! 1,000 devices report in turn. Temperature, pressure, rpm and current walk at random from their last value, vibration is
//! noise, the sequence number and the time (microseconds, with jitter) go on, one message in 50 reports another state.
//! Seeded: the same messages every time.

use std::io::Write;

const DEVICES: usize = 1000;

/// Weyl steps, mixed: far apart, and no cost of their own.
pub fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ (mixed >> 29)
}

struct Device {
    temperature: f64,
    pressure: f64,
    rpm: i64,
    current: f64,
}

/// Makes messages.
pub struct Telemetry {
    state: u64,
    devices: Vec<Device>,
    count: usize,
    micros: u64,
    message: Vec<u8>,
}

impl Telemetry {
    pub fn new(seed: u64) -> Telemetry {
        let mut state = seed;
        let mut between = |low: f64, high: f64| {
            low + (random(&mut state) >> 11) as f64 / (1u64 << 53) as f64 * (high - low)
        };
        let devices = (0..DEVICES)
            .map(|_| Device {
                temperature: between(15.0, 95.0),
                pressure: between(0.8, 9.0),
                rpm: between(600.0, 3000.0) as i64,
                current: between(2.0, 40.0),
            })
            .collect();
        Telemetry {
            state,
            devices,
            count: 0,
            micros: 1_700_000_000_000_000,
            message: Vec::with_capacity(256),
        }
    }

    /// The next message, and when it was sent, Unix ms.
    pub fn next(&mut self) -> (i64, &[u8]) {
        let noise = random(&mut self.state);
        let id = self.count % DEVICES;
        let device = &mut self.devices[id];
        let step = |shift: u32| ((noise >> shift) & 0xff) as f64 / 128.0 - 1.0;
        device.temperature += step(0) * 0.2;
        device.pressure += step(8) * 0.02;
        device.rpm += step(16) as i64 + (step(24) * 4.0) as i64;
        device.current += step(32) * 0.1;
        self.micros += 500 + (noise >> 40) % 1000;
        let state = match (noise >> 50) % 50 {
            0 => "warning",
            _ => "running",
        };
        let vibration = (noise >> 52) as f64 / 65536.0;
        let (seconds, micros) = (self.micros / 1_000_000, self.micros % 1_000_000);
        let (minute, second) = (seconds / 60 % 60, seconds % 60);
        self.message.clear();
        write!(
            self.message,
            "{{\"time\":\"2026-11-25T10:{minute:02}:{second:02}.{micros:06}Z\",\"site\":\"plant-{:02}\",\"device\":\"pump-{id:05}\",\
             \"seq\":{},\"temperature\":{:.2},\"pressure\":{:.3},\"vibration\":{vibration:.4},\"rpm\":{},\
             \"current\":{:.2},\"state\":\"{state}\"}}",
            id % 20,
            self.count,
            device.temperature,
            device.pressure,
            device.rpm,
            device.current,
        )
        .expect("a Vec takes what is written");
        self.count += 1;
        ((self.micros / 1000) as i64, &self.message)
    }
}
