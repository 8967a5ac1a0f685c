//! Rings between two threads, each pinned to a CPU of its own: crossbeam's ArrayQueue, rtrb, DPDK's
//! rte_ring and the SPSC ring of the data path, in bursts of 1, 8 and 32.
//!
//! `cargo bench --bench rings`; the time is for one object. With `-- --table` it prints a table of
//! the best and the median of many short runs instead: on a machine whose CPUs are shared, the best
//! is what the ring does while both threads run. Without the feature `dpdk` rte_ring is
//! left out. Needs two CPUs that nothing else uses.

use std::{
    hint::black_box,
    mem::MaybeUninit,
    sync::Barrier,
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, Throughput};
use crossbeam_queue::ArrayQueue;
use taffrail::memory::spsc;

/// Slots of each ring; rte_ring holds one object less.
const SLOTS: usize = 4096;
const BURSTS: [usize; 3] = [1, 8, 32];

/// Pins the calling thread.
fn pin(cpu: usize) {
    // SAFETY: the set is a plain bit mask, set up before the call that reads it.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    assert_eq!(result, 0, "CPU {cpu} cannot be used");
}

/// Moves `objects` objects from CPU 0 to CPU 1 and gives the time until the last one arrived.
/// `send` takes a prefix of a burst, `receive` fills a prefix; both give its length.
fn transfer(
    objects: u64,
    burst: usize,
    mut send: impl FnMut(&[usize]) -> usize,
    mut receive: impl FnMut(&mut [usize]) -> usize + Send,
) -> Duration {
    let start = Barrier::new(2);
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            pin(1);
            let mut out = [0; 32];
            let mut left = objects as usize;
            let mut sum = 0usize;
            start.wait();
            while left > 0 {
                let got = receive(&mut out[..burst]);
                if got == 0 {
                    std::hint::spin_loop();
                }
                for object in &out[..got] {
                    sum = sum.wrapping_add(*object);
                }
                left -= got;
            }
            sum
        });
        pin(0);
        let items: [usize; 32] = std::array::from_fn(|i| i + 1);
        let mut left = objects as usize;
        let mut sum = 0usize;
        start.wait();
        let begin = Instant::now();
        while left > 0 {
            let want = burst.min(left);
            let sent = send(&items[..want]);
            if sent == 0 {
                std::hint::spin_loop();
            }
            for object in &items[..sent] {
                sum = sum.wrapping_add(*object);
            }
            left -= sent;
        }
        let received = receiver.join().expect("the receiver ends");
        let time = begin.elapsed();
        assert_eq!(black_box(received), sum, "an object was lost or changed");
        time
    })
}

fn spsc_ring(objects: u64, burst: usize) -> Duration {
    let (mut tx, mut rx) = spsc::ring::<usize>(SLOTS);
    transfer(
        objects,
        burst,
        |items| tx.push_burst(items),
        |out| {
            // SAFETY: an initialised slice may be seen as a maybe uninitialised one that is only
            // written to.
            let out = unsafe { &mut *(std::ptr::from_mut(out) as *mut [MaybeUninit<usize>]) };
            rx.pop_burst(out)
        },
    )
}

/// As the data path uses it: descriptors of 32 bytes.
fn spsc_descriptors(objects: u64, burst: usize) -> Duration {
    let (mut tx, mut rx) = spsc::ring::<[usize; 4]>(SLOTS);
    let mut taken = Vec::with_capacity(32);
    transfer(
        objects,
        burst,
        |items| {
            let mut wide = [[0; 4]; 32];
            for (wide, item) in wide.iter_mut().zip(items) {
                *wide = [*item, 1, 2, 3];
            }
            tx.push_burst(&wide[..items.len()])
        },
        |out| {
            taken.clear();
            let got = rx.pop_into(&mut taken, out.len());
            for (out, wide) in out.iter_mut().zip(&taken) {
                *out = wide[0];
            }
            got
        },
    )
}

fn array_queue(objects: u64, burst: usize) -> Duration {
    let queue = ArrayQueue::<usize>::new(SLOTS);
    transfer(
        objects,
        burst,
        |items| {
            items
                .iter()
                .take_while(|item| queue.push(**item).is_ok())
                .count()
        },
        |out| {
            let mut got = 0;
            while got < out.len() {
                let Some(item) = queue.pop() else { break };
                out[got] = item;
                got += 1;
            }
            got
        },
    )
}

fn rtrb_ring(objects: u64, burst: usize) -> Duration {
    let (mut tx, mut rx) = rtrb::RingBuffer::<usize>::new(SLOTS);
    transfer(
        objects,
        burst,
        |items| {
            let room = tx.slots().min(items.len());
            match tx.write_chunk_uninit(room) {
                Ok(chunk) => chunk.fill_from_iter(items.iter().copied()),
                Err(_) => 0,
            }
        },
        |out| {
            let ready = rx.slots().min(out.len());
            match rx.read_chunk(ready) {
                Ok(chunk) => {
                    let (first, second) = chunk.as_slices();
                    out[..first.len()].copy_from_slice(first);
                    out[first.len()..ready].copy_from_slice(second);
                    chunk.commit_all();
                    ready
                }
                Err(_) => 0,
            }
        },
    )
}

#[cfg(feature = "dpdk")]
fn rte_ring(ring: &taffrail::eal::Ring, objects: u64, burst: usize) -> Duration {
    transfer(
        objects,
        burst,
        // SAFETY: this thread alone enqueues, the receiver alone dequeues.
        |items| unsafe { ring.enqueue_burst(items) },
        // SAFETY: as above.
        |out| unsafe { ring.dequeue_burst(out) },
    )
}

/// A ring's name, and what moves a number of objects through it in bursts.
type Named<'a> = (&'a str, &'a dyn Fn(u64, usize) -> Duration);

/// Runs and objects a run of the table: a run ends well within a scheduler's time slice.
const TABLE_RUNS: usize = 300;
const TABLE_OBJECTS: u64 = 50_000;

/// A row for each ring: best and median ns an object for each burst.
fn table(benches: &[Named<'_>]) {
    print!("| ring |");
    for burst in BURSTS {
        print!(" burst {burst}: best | median |");
    }
    println!("\n| --- |{}", " ---: | ---: |".repeat(BURSTS.len()));
    for (name, run) in benches {
        print!("| {name} |");
        for burst in BURSTS {
            let mut samples: Vec<f64> = (0..TABLE_RUNS)
                .map(|_| run(TABLE_OBJECTS, burst).as_nanos() as f64 / TABLE_OBJECTS as f64)
                .collect();
            samples.sort_by(f64::total_cmp);
            print!(" {:.1} | {:.1} |", samples[0], samples[TABLE_RUNS / 2]);
        }
        println!();
    }
}

fn main() {
    #[cfg(feature = "dpdk")]
    let ring = {
        use taffrail::eal::{EalArgs, Environment, Ring};
        let prefix = format!("tf-rings-{}", std::process::id());
        let arguments = EalArgs::new(&prefix, &[0], &[0]).memory(64, false).pci(&[]);
        let environment = Environment::start(&arguments).expect("EAL starts without devices");
        Ring::new(&environment, "rings", SLOTS as u32).expect("a ring of 4,096 slots")
    };
    #[cfg(feature = "dpdk")]
    let rte = |objects, burst| rte_ring(&ring, objects, burst);
    let benches: Vec<Named<'_>> = vec![
        ("spsc", &spsc_ring),
        ("spsc, 32-byte descriptors", &spsc_descriptors),
        ("rtrb", &rtrb_ring),
        ("crossbeam ArrayQueue", &array_queue),
        #[cfg(feature = "dpdk")]
        ("rte_ring SP/SC", &rte),
    ];
    if std::env::args().any(|argument| argument == "--table") {
        return table(&benches);
    }
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    for burst in BURSTS {
        let mut group = criterion.benchmark_group("ring");
        group.throughput(Throughput::Elements(1));
        for (name, run) in &benches {
            group.bench_with_input(BenchmarkId::new(*name, burst), &burst, |b, &burst| {
                b.iter_custom(|objects| run(objects, burst));
            });
        }
        group.finish();
    }
    criterion.final_summary();
}
