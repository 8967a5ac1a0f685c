//! DPDK's environment: started once in a process, cleaned up when its last user is gone.

use std::ffi::{CStr, CString, c_char};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// EAL can be started once in the life of a process.
static STARTED: AtomicBool = AtomicBool::new(false);

/// An error of DPDK, in words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EalError {
    /// `rte_eal_init` refused.
    #[error(
        "DPDK's environment does not start ({reason}); its own lines above say more. Arguments: {arguments}. \
         If they speak of memory, reserve hugepages (scripts/hugepages.sh apply) or lower [eal] memory; if of a \
         file prefix, another process uses it: choose another [eal] file_prefix; if of a device or driver, check \
         the spelling of the device and that its driver is installed (apt-get install dpdk)"
    )]
    Init {
        /// rte_errno in words.
        reason: String,
        /// What EAL was given.
        arguments: String,
    },
    /// An lcore on a CPU that the process may not use; EAL would abort the process.
    #[error(
        "lcores cannot run on CPU {cpu}: this process may use CPUs {allowed:?}; choose others in `lcores`, or \
         widen the process's CPU set (taskset, systemd's CPUAffinity=, the container's cpuset)"
    )]
    Cpu {
        /// The CPU asked for.
        cpu: u32,
        /// The CPUs there are.
        allowed: Vec<u32>,
    },
    /// Too few free hugepages.
    #[error(
        "DPDK's environment does not start ({reason}): {wanted} MiB of hugepages are asked for and {free} MiB are \
         free: run scripts/hugepages.sh apply, or lower [eal] memory"
    )]
    Hugepages {
        /// rte_errno in words.
        reason: String,
        /// MiB asked for.
        wanted: u64,
        /// MiB free on all nodes.
        free: u64,
    },
    /// The process's CPU set cannot be read.
    #[error("the CPUs that this process may use cannot be read: {0}")]
    Affinity(String),
    /// Started before in this process.
    #[error("DPDK's environment was started before in this process, which works only once")]
    Twice,
    /// An argument with a NUL byte.
    #[error("argument {0:?} has a NUL byte")]
    Argument(String),
    /// Another call failed.
    #[error("{what}: {reason}")]
    Call {
        /// What was tried.
        what: String,
        /// rte_errno in words.
        reason: String,
    },
}

/// The words for an errno or rte_errno value.
pub(super) fn words(code: i32) -> String {
    // SAFETY: rte_strerror returns a NUL-terminated string in storage of this thread.
    let text = unsafe { CStr::from_ptr(dpdk_sys::rte_strerror(code.abs())) };
    text.to_string_lossy().into_owned()
}

/// The words for the calling thread's rte_errno.
pub(super) fn last_error() -> String {
    // SAFETY: reads a variable of this thread.
    words(unsafe { dpdk_sys::tf_errno() })
}

/// Builds EAL's command line.
#[derive(Debug, Clone, Default)]
pub struct EalArgs {
    arguments: Vec<String>,
    /// CPUs that lcores run on.
    cpus: Vec<u32>,
    /// MiB of hugepages; 0 without hugepages.
    huge_mib: u64,
}

impl EalArgs {
    /// EAL's main lcore is number 0 and floats over `main_cpus`; lcore i + 1 is pinned to
    /// `workers[i]`.
    pub fn new(file_prefix: &str, main_cpus: &[u32], workers: &[u32]) -> Self {
        let main: Vec<String> = main_cpus.iter().map(u32::to_string).collect();
        let mut lcores = format!("0@({})", main.join(","));
        for (i, cpu) in workers.iter().enumerate() {
            lcores += &format!(",{}@{cpu}", i + 1);
        }
        let arguments = [
            "--lcores",
            &lcores,
            "--file-prefix",
            file_prefix,
            "--log-level",
            "*:warning",
        ];
        Self {
            arguments: arguments.map(str::to_owned).to_vec(),
            cpus: [main_cpus, workers].concat(),
            huge_mib: 0,
        }
    }

    /// Memory in MiB; with hugepages, whose files vanish with the process however it ends, or
    /// without.
    #[must_use]
    pub fn memory(mut self, mib: u64, hugepages: bool) -> Self {
        self.huge_mib = if hugepages { mib } else { 0 };
        self.arguments.extend(["-m".to_owned(), mib.to_string()]);
        self.arguments.push(
            if hugepages {
                "--huge-unlink"
            } else {
                "--no-huge"
            }
            .to_owned(),
        );
        self
    }

    /// Only these PCI devices are touched; with none, the bus is not scanned.
    #[must_use]
    pub fn pci(mut self, addresses: &[String]) -> Self {
        if addresses.is_empty() {
            self.arguments.push("--no-pci".to_owned());
        }
        for address in addresses {
            self.arguments.extend(["-a".to_owned(), address.clone()]);
        }
        self
    }

    /// A virtual device.
    #[must_use]
    pub fn vdev(mut self, device: &str) -> Self {
        self.arguments.push(format!("--vdev={device}"));
        self
    }

    /// Arguments as they are.
    #[must_use]
    pub fn extra(mut self, arguments: &[String]) -> Self {
        self.arguments.extend_from_slice(arguments);
        self
    }
}

/// A started environment; clones share it.
#[derive(Debug, Clone)]
pub struct Environment {
    _inner: Arc<Started>,
}

#[derive(Debug)]
struct Started;

impl Environment {
    /// Starts EAL on the calling thread, which becomes its main lcore.
    ///
    /// What can be told beforehand (a CPU that the process may not use) is refused without using up
    /// the one start that a process has.
    pub fn start(arguments: &EalArgs) -> Result<Self, EalError> {
        let allowed = super::affinity::allowed_at_start()
            .map_err(|error| EalError::Affinity(error.to_string()))?;
        if let Some(cpu) = arguments.cpus.iter().find(|cpu| !allowed.contains(cpu)) {
            return Err(EalError::Cpu {
                cpu: *cpu,
                allowed: allowed.to_vec(),
            });
        }
        if STARTED.swap(true, Ordering::SeqCst) {
            return Err(EalError::Twice);
        }
        let owned: Vec<CString> = std::iter::once("taffrail")
            .chain(arguments.arguments.iter().map(String::as_str))
            .map(|a| CString::new(a).map_err(|_| EalError::Argument(a.to_owned())))
            .collect::<Result<_, _>>()?;
        // EAL keeps pointers into its arguments (devargs), so they live as long as the process.
        let pointers: Vec<*mut c_char> = owned.into_iter().map(CString::into_raw).collect();
        let mut pointers = pointers.into_boxed_slice();
        // SAFETY: argc and argv describe NUL-terminated strings that are never freed.
        let result =
            unsafe { dpdk_sys::rte_eal_init(pointers.len() as i32, pointers.as_mut_ptr()) };
        std::mem::forget(pointers);
        if result < 0 {
            let reason = last_error();
            let free = free_huge_mib();
            if free < arguments.huge_mib {
                return Err(EalError::Hugepages {
                    reason,
                    wanted: arguments.huge_mib,
                    free,
                });
            }
            return Err(EalError::Init {
                reason,
                arguments: arguments.arguments.join(" "),
            });
        }
        Ok(Self {
            _inner: Arc::new(Started),
        })
    }
}

/// MiB in free hugepages of all sizes; what cannot be read counts as none.
fn free_huge_mib() -> u64 {
    let Ok(sizes) = std::fs::read_dir("/sys/kernel/mm/hugepages") else {
        return 0;
    };
    let kib = sizes.flatten().filter_map(|size| {
        let name = size.file_name().into_string().ok()?;
        let kib: u64 = name
            .strip_prefix("hugepages-")?
            .strip_suffix("kB")?
            .parse()
            .ok()?;
        let free = std::fs::read_to_string(size.path().join("free_hugepages")).ok()?;
        Some(kib * free.trim().parse::<u64>().ok()?)
    });
    kib.sum::<u64>() >> 10
}

impl Drop for Started {
    fn drop(&mut self) {
        // SAFETY: everything made under the environment held it, so nothing of it is in use.
        unsafe { dpdk_sys::rte_eal_cleanup() };
    }
}
