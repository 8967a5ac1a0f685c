//! Looks at the machine before anything is started, so that what is missing is said at once, all of
//! it, with the command that mends it.
//!
//! Pure over [`Facts`], which [`Facts::gather`] reads from the running system.

use std::path::Path;

use bytesize::ByteSize;

use crate::config::{Config, Device};

/// Packet buffers and descriptors of one port take about this much beside its mempool: EAL's own
/// structures and alignment to whole hugepages.
const EAL_BASE: u64 = 64 << 20;
/// Files that a server needs open beside Kafka connections: segments, SSTs, sockets, control clients.
const FILES_NEEDED: u64 = 1024;

/// What is wrong and what mends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Whether the server cannot start so.
    pub fatal: bool,
    /// What was found, and the remedy.
    pub text: String,
}

/// What was read from the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Free hugepage memory over all page sizes, in bytes.
    pub hugepages_free: u64,
    /// Reserved hugepage memory, in bytes.
    pub hugepages_total: u64,
    /// Whether a hugetlbfs is mounted.
    pub hugetlbfs: bool,
    /// Limit on locked memory; `None`: unlimited, or the process may exceed it (CAP_IPC_LOCK).
    pub memlock: Option<u64>,
    /// Hard limit on open files, to which a server raises its own.
    pub files: u64,
    /// Why io_uring cannot be used, where it cannot.
    pub io_uring: Option<String>,
    /// Kernel drivers of the PCI ports: (address, driver); no driver where none is bound.
    pub drivers: Vec<(String, Option<String>)>,
}

/// Drivers under which DPDK can use a PCI device; the last ones keep their kernel driver.
const USABLE_DRIVERS: [&str; 6] = [
    "vfio-pci",
    "uio_pci_generic",
    "igb_uio",
    "mlx4_core",
    "mlx5_core",
    "mana",
];

impl Facts {
    /// Reads the running system.
    pub fn gather(config: &Config) -> Self {
        let (hugepages_total, hugepages_free) = hugepages(Path::new("/sys/kernel/mm/hugepages"));
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
        let drivers = config
            .ports
            .iter()
            .filter_map(|port| match &port.device {
                Device::Pci(address) => Some((address.clone(), pci_driver(address))),
                _ => None,
            })
            .collect();
        let io_uring = io_uring::IoUring::new(8)
            .err()
            .map(|error| error.to_string());
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
        Self {
            hugepages_free,
            hugepages_total,
            hugetlbfs: mounts
                .lines()
                .any(|line| line.split(' ').nth(2) == Some("hugetlbfs")),
            memlock: if may_lock_memory(&status) {
                None
            } else {
                limit(&limits, "Max locked memory", SOFT)
            },
            files: limit(&limits, "Max open files", HARD).unwrap_or(u64::MAX),
            io_uring,
            drivers,
        }
    }
}

/// Compares the machine with what the configuration needs.
pub fn check(config: &Config, facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut say = |fatal: bool, text: String| findings.push(Finding { fatal, text });
    let staging = config.storage.staging_size * u64::from(config.storage.shards);
    // Without a port of its own DPDK is not started.
    let dpdk = config.eal.hugepages && config.dpdk_ports().next().is_some();
    let eal = if dpdk {
        config.eal.memory.unwrap_or(EAL_BASE)
    } else {
        0
    };
    if dpdk && facts.hugepages_free < eal {
        let pages = (eal + staging).div_ceil(2 << 20);
        say(
            true,
            format!(
                "{} of hugepages are free (of {} reserved), packet buffers need at least {}: run \
                 `scripts/hugepages.sh apply`, or `echo {pages} > /proc/sys/vm/nr_hugepages`; for a test \
                 without hugepages set hugepages = false in [eal]",
                ByteSize(facts.hugepages_free).display().iec(),
                ByteSize(facts.hugepages_total).display().iec(),
                ByteSize(eal).display().iec()
            ),
        );
    } else if facts.hugepages_free < eal + staging {
        say(
            false,
            format!(
                "too few hugepages are free for the staging buffers' {}: they use ordinary pages; reserve more \
                 with scripts/hugepages.sh",
                ByteSize(staging).display().iec()
            ),
        );
    }
    if dpdk && !facts.hugetlbfs {
        say(
            true,
            "no hugetlbfs is mounted: run `mount -t hugetlbfs hugetlbfs /dev/hugepages`".to_owned(),
        );
    }
    if let Some(reason) = &facts.io_uring {
        say(
            true,
            format!(
                "io_uring cannot be used ({reason}): check `sysctl kernel.io_uring_disabled` (needs 0), and in a \
                 container allow io_uring_setup, io_uring_enter and io_uring_register in its seccomp profile"
            ),
        );
    }
    if let Some(limit) = facts.memlock
        && limit < staging
    {
        say(
            true,
            format!(
                "the limit on locked memory is {}, io_uring registers {} of staging buffers: run as root, raise it \
                 with `ulimit -l` (LimitMEMLOCK= in systemd), or grant CAP_IPC_LOCK",
                ByteSize(limit).display().iec(),
                ByteSize(staging).display().iec()
            ),
        );
    }
    if facts.files < FILES_NEEDED {
        say(
            false,
            format!(
                "the limit on open files is {}: raise it to {FILES_NEEDED} or more with `ulimit -n` (LimitNOFILE= in systemd)",
                facts.files
            ),
        );
    } else if let Some(kafka) = &config.kafka
        && let most = u64::from(kafka.max_connections)
        && facts.files < FILES_NEEDED + most
    {
        say(
            false,
            format!(
                "the limit on open files is {}: room for some {} Kafka connections of max_connections = {most}; raise it to \
                 {} with `ulimit -Hn` (LimitNOFILE= in systemd)",
                facts.files,
                facts.files - FILES_NEEDED,
                FILES_NEEDED + most
            ),
        );
    }
    for (address, driver) in &facts.drivers {
        match driver.as_deref() {
            Some(driver) if USABLE_DRIVERS.contains(&driver) => {}
            Some(driver) => say(
                true,
                format!(
                    "port {address} is bound to {driver}: run `scripts/bind-nics.sh bind {address}`"
                ),
            ),
            None => say(
                true,
                format!(
                    "port {address} has no driver, or there is no such device: run `scripts/bind-nics.sh show`"
                ),
            ),
        }
    }
    findings
}

/// (reserved, free) hugepage memory in bytes, all sizes and nodes together.
fn hugepages(folder: &Path) -> (u64, u64) {
    let mut sums = (0, 0);
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let size = name.to_str().and_then(|n| {
            n.strip_prefix("hugepages-")?
                .strip_suffix("kB")?
                .parse::<u64>()
                .ok()
        });
        let count = |file: &str| -> u64 {
            let text = std::fs::read_to_string(entry.path().join(file)).unwrap_or_default();
            text.trim().parse().unwrap_or(0)
        };
        if let Some(kib) = size {
            sums.0 += kib * 1024 * count("nr_hugepages");
            sums.1 += kib * 1024 * count("free_hugepages").saturating_sub(count("resv_hugepages"));
        }
    }
    sums
}

/// The kernel driver bound to a PCI device.
fn pci_driver(address: &str) -> Option<String> {
    let link = std::fs::read_link(format!("/sys/bus/pci/devices/{address}/driver")).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

/// Whether the effective capabilities in `/proc/self/status` hold CAP_IPC_LOCK (bit 14).
fn may_lock_memory(status: &str) -> bool {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|caps| caps & (1 << 14) != 0)
}

/// Columns of `/proc/self/limits`.
const SOFT: usize = 0;
const HARD: usize = 1;

/// A limit of `/proc/self/limits`; `None` if unlimited.
fn limit(limits: &str, name: &str, column: usize) -> Option<u64> {
    limits
        .lines()
        .find_map(|line| line.strip_prefix(name))?
        .split_whitespace()
        .nth(column)?
        .parse()
        .ok()
}

/// Raises the limit on open files as far as the process may: each connection is a file, and the soft limit is a low one for
/// programs that use `select`. [`check`] has said whether it is enough.
pub fn raise_files() {
    let mut files = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the structure is this function's, and lives beyond both calls.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut files) == 0 && files.rlim_cur < files.rlim_max
        {
            files.rlim_cur = files.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &files);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let text = "[storage]\npath = \"/d\"\n[[port]]\nname = \"a\"\ndevice = \"3b:00.0\"\n";
        Config::parse(text, Path::new("t.toml")).unwrap()
    }

    fn fine() -> Facts {
        Facts {
            hugepages_free: 1 << 30,
            hugepages_total: 1 << 30,
            hugetlbfs: true,
            memlock: None,
            files: 4096,
            io_uring: None,
            drivers: vec![("0000:3b:00.0".into(), Some("vfio-pci".into()))],
        }
    }

    #[test]
    fn a_prepared_machine_has_no_findings() {
        assert_eq!(check(&config(), &fine()), []);
    }

    #[test]
    fn everything_that_is_missing_is_named_with_its_remedy() {
        let facts = Facts {
            hugepages_free: 0,
            hugepages_total: 0,
            hugetlbfs: false,
            memlock: Some(8 << 20),
            files: 256,
            io_uring: Some("Operation not permitted".into()),
            drivers: vec![("0000:3b:00.0".into(), Some("ixgbe".into()))],
        };
        let findings = check(&config(), &facts);
        let all: String = findings.iter().map(|f| f.text.as_str()).collect();
        for part in [
            "scripts/hugepages.sh",
            "mount -t hugetlbfs",
            "io_uring_disabled",
            "CAP_IPC_LOCK",
            "ulimit -n",
            "0000:3b:00.0 is bound to ixgbe: run `scripts/bind-nics.sh bind",
        ] {
            assert!(all.contains(part), "{part} is not in {all}");
        }
        assert_eq!(findings.iter().filter(|f| f.fatal).count(), 5);
    }

    #[test]
    fn a_server_without_ports_needs_no_hugepages() {
        let facts = Facts {
            hugepages_free: 0,
            hugepages_total: 0,
            hugetlbfs: false,
            ..fine()
        };
        let portless = Config {
            ports: Vec::new(),
            ..config()
        };
        assert!(check(&portless, &facts).iter().all(|f| !f.fatal));
        let mut kernel = config();
        kernel.ports[0].device = Device::Kernel;
        assert!(check(&kernel, &facts).iter().all(|f| !f.fatal));
        assert!(check(&config(), &facts).iter().any(|f| f.fatal));
    }

    #[test]
    fn too_few_files_for_the_connections_are_a_remark() {
        let text = "[storage]\npath = \"/d\"\n[kafka]\nmax_connections = 5000\n";
        let config = Config::parse(text, Path::new("t.toml")).unwrap();
        let of = |files| check(&config, &Facts { files, ..fine() });
        let findings: Vec<Finding> = of(4096);
        let about = findings.iter().find(|f| f.text.contains("3072 Kafka"));
        assert!(about.is_some_and(|f| !f.fatal && f.text.contains("6024")));
        assert!(of(6024).iter().all(|f| !f.text.contains("open files")));
    }

    #[test]
    fn the_limit_on_files_is_raised_as_far_as_it_may_be() {
        raise_files();
        let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
        let of = |column| limit(&limits, "Max open files", column);
        assert_eq!(of(SOFT), of(HARD));
    }

    #[test]
    fn staging_without_hugepages_is_a_remark_only() {
        let facts = Facts {
            hugepages_free: 70 << 20,
            ..fine()
        };
        let findings = check(&config(), &facts);
        assert_eq!(findings.len(), 1);
        assert!(!findings[0].fatal);
    }

    #[test]
    fn proc_files_are_understood() {
        assert!(may_lock_memory("Name:\tx\nCapEff:\t000001ffffffffff\n"));
        assert!(!may_lock_memory("CapEff:\t0000000000000000\n"));
        let limits = "Max locked memory         8388608              9388608              bytes\nMax open files  1024 unlimited files\n";
        assert_eq!(limit(limits, "Max locked memory", SOFT), Some(8 << 20));
        assert_eq!(limit(limits, "Max locked memory", HARD), Some(9_388_608));
        assert_eq!(limit(limits, "Max open files", SOFT), Some(1024));
        assert_eq!(limit(limits, "Max open files", HARD), None);
        let facts = Facts::gather(&config());
        assert_eq!(facts.drivers, [("0000:3b:00.0".to_owned(), None)]);
    }
}
