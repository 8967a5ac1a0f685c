//! What the kernel says that this process takes of memory.

use std::path::Path;

/// Bytes by kind. Source: proc(5), `/proc/self/status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Process {
    /// Pages of no file: heap, stacks.
    pub anonymous: u64,
    /// Pages shared with files in memory: staging buffers on tmpfs.
    pub shared: u64,
    /// Pages of hugetlbfs: packet buffers, staging buffers.
    pub huge: u64,
    /// Mapped pages of files, the page cache's: SSTs and the program. The kernel takes them back when it must.
    pub file: u64,
    /// The most that `anonymous`, `shared` and `file` were together.
    pub peak: u64,
}

impl Process {
    /// Of this process, now; zeros where /proc cannot be read.
    pub fn now() -> Process {
        let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        Process::parse(&text)
    }

    fn parse(status: &str) -> Process {
        let of = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|rest| rest.strip_prefix(':')?.split_whitespace().next());
            number.and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) << 10
        };
        Process {
            anonymous: of("RssAnon"),
            shared: of("RssShmem"),
            huge: of("HugetlbPages"),
            file: of("RssFile"),
            peak: of("VmHWM"),
        }
    }

    /// What counts against a budget: all but what the kernel can take back.
    pub fn taken(&self) -> u64 {
        self.anonymous + self.shared + self.huge
    }
}

/// Bytes of memory that this process may take at most: the machine's, or its control group's limit where that is lower.
pub fn available() -> u64 {
    let machine = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = machine
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(u64::MAX, |kib| kib << 10);
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    total.min(group_limit(Path::new("/sys/fs/cgroup"), &groups))
}

/// The lowest limit of a control group (version 2) and of those above it; `u64::MAX`: none.
fn group_limit(root: &Path, groups: &str) -> u64 {
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    let Some(own) = own else { return u64::MAX };
    let own = root.join(own);
    let limit = |folder: &Path| {
        let text = std::fs::read_to_string(folder.join("memory.max")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    own.ancestors()
        .take_while(|folder| folder.starts_with(root))
        .filter_map(limit)
        .min()
        .unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_understood() {
        let text = "VmHWM:\t   3000 kB\nRssAnon:\t    1000 kB\nRssFile:\t     20 kB\nRssShmem:\t       3 kB\nHugetlbPages:\t    2048 kB\n";
        let process = Process::parse(text);
        assert_eq!(process.anonymous, 1000 << 10);
        assert_eq!((process.shared, process.file), (3 << 10, 20 << 10));
        assert_eq!((process.huge, process.peak), (2048 << 10, 3000 << 10));
        assert_eq!(process.taken(), 3051 << 10);
        assert!(Process::now().anonymous > 0);
        assert!(available() > 1 << 20);
    }

    #[test]
    fn the_lowest_group_limit_counts() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("a/b");
        std::fs::create_dir_all(&inner).unwrap();
        let groups = "1:name=x:/y\n0::/a/b\n";
        assert_eq!(group_limit(root.path(), groups), u64::MAX);
        std::fs::write(inner.join("memory.max"), "max\n").unwrap();
        assert_eq!(group_limit(root.path(), groups), u64::MAX);
        std::fs::write(root.path().join("a/memory.max"), "1048576\n").unwrap();
        assert_eq!(group_limit(root.path(), groups), 1 << 20);
        std::fs::write(inner.join("memory.max"), "2097152\n").unwrap();
        assert_eq!(group_limit(root.path(), groups), 1 << 20);
        assert_eq!(group_limit(root.path(), ""), u64::MAX);
    }
}
