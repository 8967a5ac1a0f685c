//! The safe types over DPDK on virtual devices, without hugepages: packets from a capture file,
//! packets around a loop, errors in words. EAL starts once in a process, so this is one test.

#![cfg(feature = "dpdk")]

use std::io::Write;

use taffrail::eal::{
    EalArgs, EalError, Environment, Mbuf, Mempool, Port, PortConfig, PortError, RxBurst, TxBurst,
    affinity, free_handles, lcore,
};

/// A capture file (pcap, little-endian, microseconds) with these frames.
fn capture(frames: &[Vec<u8>]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::with_suffix(".pcap").unwrap();
    let mut header = vec![0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0];
    header.extend([0; 8]);
    header.extend(65535u32.to_le_bytes());
    header.extend(1u32.to_le_bytes());
    file.write_all(&header).unwrap();
    for frame in frames {
        let len = (frame.len() as u32).to_le_bytes();
        file.write_all(&[[0; 4], [0; 4], len, len].concat())
            .unwrap();
        file.write_all(frame).unwrap();
    }
    file.flush().unwrap();
    file
}

const CONFIG: PortConfig = PortConfig {
    rx_queues: 1,
    tx_queues: 1,
    descriptors: 256,
    mtu: 1500,
    promiscuous: true,
    all_multicast: true,
};

fn frame(pool: &Mempool, bytes: &[u8]) -> Mbuf {
    let mut mbuf = pool.allocate().unwrap();
    mbuf.room()[..bytes.len()].copy_from_slice(bytes);
    mbuf.set_len(bytes.len());
    assert_eq!(mbuf.data(), bytes);
    mbuf
}

/// The kernel's list of the CPUs that this thread may run on.
fn cpus_of_this_thread() -> String {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("Cpus_allowed_list:"));
    line.unwrap().trim().to_owned()
}

#[test]
fn packets_lcores_and_errors() {
    let frames: Vec<Vec<u8>> = (0..100u8).map(|i| vec![i; 60 + usize::from(i)]).collect();
    let file = capture(&frames);
    let arguments = EalArgs::new(&format!("tf-eal-{}", std::process::id()), &[0], &[0])
        .memory(64, false)
        .pci(&[])
        .vdev(&format!("net_pcap0,rx_pcap={}", file.path().display()))
        .vdev("net_ring0")
        .vdev("net_null0,size=80");
    // A CPU that is not there is refused, and the start is not used up by it.
    let cpu = EalArgs::new("tf-eal-cpu", &[0], &[1023]);
    let refused = Environment::start(&cpu).unwrap_err();
    assert!(
        matches!(&refused, EalError::Cpu { cpu: 1023, .. }),
        "{refused}"
    );
    let before = cpus_of_this_thread();
    let environment = Environment::start(&arguments).unwrap();

    // A thread made on a pinned one inherits its CPU until it is let loose.
    assert_eq!(cpus_of_this_thread(), "0");
    let (inherited, loose) = std::thread::spawn(|| {
        let inherited = cpus_of_this_thread();
        affinity::unpin_this_thread().unwrap();
        (inherited, cpus_of_this_thread())
    })
    .join()
    .unwrap();
    assert_eq!((inherited.as_str(), loose), ("0", before));
    assert_eq!(Environment::start(&arguments).unwrap_err(), EalError::Twice);

    let pool = Mempool::new(&environment, "test", 2047, 2048 + 128, None).unwrap();
    let too_large = Mempool::new(&environment, "large", 10_000_000, 9000, None).unwrap_err();
    assert!(
        too_large.to_string().contains("hugepages.sh"),
        "{too_large}"
    );
    let unknown = Port::by_name(&environment, "net_none0").unwrap_err();
    assert!(
        matches!(&unknown, PortError::Unknown { known, .. } if known.contains("net_ring0")),
        "{unknown}"
    );

    // A capture is received whole, in order, and every mbuf comes back.
    let port = Port::by_name(&environment, "net_pcap0,rx_pcap=x").unwrap();
    assert_eq!(port.driver(), "net_pcap");
    assert_eq!(port.mac(), [2, 0x70, 0x63, 0x61, 0x70, 0]);
    let too_many = port
        .start(
            &PortConfig {
                rx_queues: 60,
                ..CONFIG
            },
            &vec![pool.clone(); 60],
        )
        .unwrap_err();
    assert!(
        too_many.to_string().contains("lower `queues`"),
        "{too_many}"
    );
    let (rx, tx) = port.start(&CONFIG, std::slice::from_ref(&pool)).unwrap();
    let mut burst = RxBurst::new();
    let mut seen = Vec::new();
    while seen.len() < frames.len() {
        let count = rx[0].receive(&mut burst);
        let mut handles = Vec::new();
        for i in 0..count {
            burst.prefetch_mbuf(i + 1);
            burst.prefetch_data(i + 1);
            assert!(burst.one_segment(i));
            assert_eq!(burst.checksums_good(i), (false, false));
            let (start, headroom) = burst.frame_start(i);
            assert_eq!(start.cast_const(), burst.frame(i).as_ptr());
            assert!(headroom >= taffrail::eal::HEADROOM);
            seen.push(burst.frame(i).to_vec());
            // Every third goes elsewhere, as a message does on its way to a shard.
            if i % 3 == 0 {
                handles.push(burst.take(i));
            }
        }
        burst.free_rest();
        // SAFETY: each handle was taken above, once.
        unsafe { free_handles(&handles) };
    }
    assert_eq!(seen, frames);
    assert_eq!(port.stats().rx_packets, 100);
    assert!(port.link().up);
    drop((rx, tx, port));
    assert_eq!(pool.available(), pool.count());

    // A loop: what is sent into net_ring is received from it.
    let port = Port::by_name(&environment, "net_ring0").unwrap();
    let (rx, tx) = port.start(&CONFIG, std::slice::from_ref(&pool)).unwrap();
    let worker = lcore::launch(&environment, 1, move || {
        assert_eq!(lcore::current(), Some(1));
        let (mut out, mut burst) = (TxBurst::new(), RxBurst::new());
        out.push(frame(&pool, b"there and back")).unwrap();
        assert_eq!(tx[0].send(&mut out), 1);
        assert_eq!(rx[0].receive(&mut burst), 1);
        assert_eq!(burst.frame(0), b"there and back");
        drop((burst, out));
        pool
    })
    .unwrap();
    let pool = worker.join().unwrap();
    assert_eq!(pool.available(), pool.count());
    assert_eq!(port.stats().tx_packets, 1);
    assert!(!port.extended_stats().is_empty());

    // A panic stays on its lcore.
    let worker = lcore::launch(&environment, 1, || panic!("on purpose")).unwrap();
    assert!(worker.join().is_err());
    assert!(lcore::launch(&environment, 77, || ()).is_err());
    assert_eq!(lcore::current(), Some(0));
}
