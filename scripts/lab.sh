#!/usr/bin/env bash
# lab.sh - a throw-away QEMU guest with real PCI NICs, an IOMMU and two NUMA nodes, to try what needs hardware.
#
# usage: sudo scripts/lab.sh prepare          gets a Debian kernel, builds the small initramfs (once)
#        sudo scripts/lab.sh run 'COMMAND'    boots, runs COMMAND as root in the guest, prints its output,
#                                             powers off; the exit status is the command's
#                                             (124: time limit, 125: the guest never got that far,
#                                             126: QEMU crashed)
#        sudo scripts/lab.sh boot             boots and gives an interactive root shell (Ctrl-A X quits)
#
# The guest runs in software (no KVM needed; a boot takes less than a minute): q35 with an Intel IOMMU and two
# NUMA nodes. Its root is this machine's own /, read-only below; what it writes stays in its memory and vanishes.
# $LAB_SHARE is writable at /share; the working directory is the same as outside. NIC 0 is for management; the NICs
# of LAB_NICS follow, each below a PCIe expander of its NUMA node (e1000: below a conventional bridge of the
# node, so that all of a node form one IOMMU group). NIC N ends outside in the tap labN with 10.77.N.1/24 and
# fd77:N::1/64, in a network namespace of this run alone; its MAC address is 52:54:00:77:NN:02. No packet leaves it.
#
# Settings, by environment:
#   LAB_NICS       data NICs, MODEL:NODE[:QUEUE PAIRS]; models: e1000e, igb, virtio, e1000   "e1000e:0 virtio:1:4"
#   LAB_MEM        MiB, half of it on each node                                    4096
#   LAB_CPUS       CPUs, an even number, half of them on each node                 4
#   LAB_DISK       MiB of an empty NVMe disk (/dev/nvme0n1); 0: none               0
#   LAB_IOMMU      0: a machine without an IOMMU                                   1
#   LAB_APPEND     more kernel arguments
#   LAB_TIMEOUT    seconds for boot and command                                    180
#   LAB_PEER       shell command run beside the guest, in the namespace with the taps; it finds the share's folder
#                  in $SHARE, and its output goes to $LAB_SHARE/peer.log
#   LAB_SHARE      folder that the guest sees as /share                            $LAB_DIR/share
#   LAB_DIR        cache: kernel, modules, initramfs                               target/lab
#   LAB_KERNEL_DEB a linux-image package file to use                               (fetched by apt)

set -u -o pipefail
script=$(realpath "$0")
root=${script%/scripts/*}
# shellcheck source=scripts/lib.sh
. "$root/scripts/lib.sh"
LAB_DIR=${LAB_DIR:-$root/target/lab}
LAB_SHARE=${LAB_SHARE:-$LAB_DIR/share}
LAB_NICS=${LAB_NICS:-"e1000e:0 virtio:1:4"}
LAB_MEM=${LAB_MEM:-4096}
LAB_CPUS=${LAB_CPUS:-4}
LAB_DISK=${LAB_DISK:-0}
LAB_IOMMU=${LAB_IOMMU:-1}
LAB_APPEND=${LAB_APPEND:-}
LAB_TIMEOUT=${LAB_TIMEOUT:-180}
LAB_PEER=${LAB_PEER:-}
LAB_KERNEL_DEB=${LAB_KERNEL_DEB:-}

fail() { echo "lab.sh: $*" >&2; exit 125; }

# Full paths of a module and what it needs, dependencies first (modules.dep is relative).
modules_for() {
    modprobe -d "$LAB_DIR/kernel" -S "$1" --show-depends "$2" | awk '$1 == "insmod" { print $2 }'
}

# The name of the package that linux-image-amd64 stands for. The generic flavour is needed: the cloud one has
# neither 9p nor the Intel NIC drivers.
kernel_package() { apt-cache depends linux-image-amd64 2>/dev/null | awk '/Depends: linux-image-/ { print $2; exit }'; }

prepare() {
    local tool version package module init=$LAB_DIR/init missing=()
    for tool in qemu-system-x86_64 cpio depmod modprobe ip unshare dpkg-deb busybox; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || missing+=("$tool")
    done
    ((${#missing[@]} == 0)) || fail "missing: ${missing[*]}; run scripts/install-deps.sh --lab"
    mkdir -p "$LAB_DIR"
    # Two runs at the same time: one prepares.
    exec {prepare_lock}>"$LAB_DIR/lock"
    flock "$prepare_lock"
    if [[ -s $LAB_DIR/initramfs && -s $LAB_DIR/vmlinuz && ! $script -nt $LAB_DIR/initramfs ]]; then
        exec {prepare_lock}>&-
        return 0
    fi
    if [[ ! -s $LAB_DIR/vmlinuz ]]; then
        rm -rf "$LAB_DIR/kernel"
        mkdir -p "$LAB_DIR/kernel"
        package=$LAB_KERNEL_DEB
        if [[ -z $package ]]; then
            [[ -n $(kernel_package) ]] || apt-get update -qq >&2
            version=$(kernel_package)
            [[ -n $version ]] || fail "apt knows no linux-image-amd64; give a kernel package by LAB_KERNEL_DEB=FILE"
            rm -f "$LAB_DIR"/linux-image-*.deb
            (cd "$LAB_DIR" && apt-get download -q "$version") >"$LAB_DIR/download.log" 2>&1 ||
                fail "cannot download $version ($LAB_DIR/download.log); give a kernel package by LAB_KERNEL_DEB=FILE"
            package=$(echo "$LAB_DIR"/linux-image-*.deb)
        fi
        dpkg-deb -x "$package" "$LAB_DIR/kernel" || fail "cannot unpack $package"
        version=$(basename "$LAB_DIR"/kernel/lib/modules/*)
        depmod -b "$LAB_DIR/kernel" "$version" || fail "depmod failed"
        cp "$LAB_DIR/kernel/boot/vmlinuz-$version" "$LAB_DIR/vmlinuz"
    fi
    version=$(basename "$LAB_DIR"/kernel/lib/modules/*)
    rm -rf "$init"
    mkdir -p "$init/bin" "$init/mod"
    # The initramfs holds only what it takes to reach the 9p root; the rest comes from there.
    for module in virtio_pci 9pnet_virtio 9p overlay virtio_console; do
        modules_for "$version" $module
    done | awk '!seen[$0]++' | while read -r module; do
        cp "$module" "$init/mod/" && basename "$module" >>"$init/mod/order"
    done
    cp "$(command -v busybox)" "$init/bin/busybox"
    write_init "$init"
    (cd "$init" && find . | cpio -o -H newc --quiet) >"$LAB_DIR/initramfs.new" || fail "cpio failed"
    mv "$LAB_DIR/initramfs.new" "$LAB_DIR/initramfs"
    exec {prepare_lock}>&-
}

# /init finds the root; /stage2 continues in it with this machine's own programs.
write_init() {
    cat >"$1/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /low /mem /new
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
while read m; do insmod /mod/$m; done </mod/order
nine=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o ro,cache=loose,$nine root /low && mount -t tmpfs mem /mem && mkdir /mem/up /mem/work &&
    mount -t overlay -o lowerdir=/low,upperdir=/mem/up,workdir=/mem/work root /new || poweroff -f
mkdir -p /new/share /new/lab /new/usr/lib/modules
for d in proc sys dev; do mount --move /$d /new/$d; done
mount -t tmpfs run /new/run
mount -t 9p -o ro,cache=loose,$nine modules /new/usr/lib/modules
mount -t 9p -o cache=none,$nine share /new/share; mount -t 9p -o cache=none,$nine ctl /new/lab
cp /stage2 /new/run/stage2
exec switch_root /new /bin/bash /run/stage2
INIT
    cat >"$1/stage2" <<'STAGE2'
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LANG=C.UTF-8
mkdir -p /dev/pts /dev/shm /dev/hugepages
ln -s /proc/self/fd /dev/fd; for n in 0:stdin 1:stdout 2:stderr; do ln -s "fd/${n%:*}" "/dev/${n#*:}"; done
mount -t devpts devpts /dev/pts; mount -t tmpfs shm /dev/shm; mount -t hugetlbfs huge /dev/hugepages
echo lab >/proc/sys/kernel/hostname
for d in /sys/bus/pci/devices/* /sys/bus/virtio/devices/*; do  # what udev would do, for NICs and NVMe
    read -r c <"$d/class" || c=0x02; [[ $c == 0x02* || $c == 0x0108* ]] && modprobe -qb "$(<"$d/modalias")"
done 2>/dev/null
ip link set lo up
for n in /sys/class/net/*; do                                # management: the first MAC
    [[ $(<"$n/address") == 52:54:00:77:00:02 ]] && ip addr add 10.77.0.2/24 dev "${n##*/}" && ip link set "${n##*/}" up
done
. /lab/env; cd "$LAB_CWD" 2>/dev/null || cd /
out=/dev/console
for p in /sys/class/virtio-ports/*; do [[ $(<"$p/name") == lab.out ]] && out=/dev/${p##*/}; done
read -r up _ </proc/uptime; echo "lab: ready after ${up}s" >/dev/console
if [[ -e /lab/cmd ]]; then setsid -w bash /lab/cmd >"$out" 2>&1 </dev/null; echo $? >/lab/rc
else setsid -cw bash -i <>/dev/ttyS0 >&0 2>&1; fi
sync; echo o >/proc/sysrq-trigger; while :; do :; done
STAGE2
    chmod +x "$1/init"
}

# QEMU's arguments, in the array `q`.  $1: control directory of this run.
arguments() {
    local number=0 node nic model queues device chassis=1 share
    local iommu='' dma=''
    local -A bridge=()
    q=(-accel "tcg,thread=multi" -machine q35 -cpu "max,la57=off" -smp "$LAB_CPUS" -m "$LAB_MEM"
       -nodefaults -no-user-config -display none -no-reboot
       -kernel "$LAB_DIR/vmlinuz" -initrd "$LAB_DIR/initramfs")
    if [[ $LAB_IOMMU == 1 ]]; then
        q+=(-device "intel-iommu,intremap=on,caching-mode=on,device-iotlb=on")
        iommu=intel_iommu=on dma=,iommu_platform=on,ats=on
    fi
    # no_timer_check: on a busy host the kernel's test of its timer fails at boot, and it panics.
    q+=(-append "console=ttyS0 quiet panic=-1 mitigations=off audit=0 apparmor=0 no_timer_check $iommu $LAB_APPEND")
    for node in 0 1; do
        q+=(-object "memory-backend-ram,id=mem$node,size=$((LAB_MEM / 2))M"
            -numa "node,nodeid=$node,memdev=mem$node,cpus=$((node * LAB_CPUS / 2))-$(((node + 1) * LAB_CPUS / 2 - 1))"
            -device "pxb-pcie,id=pxb$node,bus=pcie.0,bus_nr=$((32 + 32 * node)),numa_node=$node")
    done
    q+=(-fsdev "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"
        -fsdev "local,id=modules,path=$LAB_DIR/kernel/lib/modules,security_model=none,readonly=on"
        -fsdev "local,id=share,path=$LAB_SHARE,security_model=none,multidevs=remap"
        -fsdev "local,id=ctl,path=$1,security_model=none")
    for share in root modules share ctl; do
        q+=(-device "virtio-9p-pci,bus=pcie.0,fsdev=$share,mount_tag=$share")
    done
    if ((LAB_DISK > 0)); then
        truncate -s "${LAB_DISK}M" "$1/disk" || fail "cannot make a disk"
        q+=(-drive "file=$1/disk,if=none,id=disk,format=raw,cache=none,aio=threads"
            -device "nvme,serial=lab,drive=disk,bus=pcie.0")
    fi
    for nic in virtio:- $LAB_NICS; do       # NIC 0: management, on the root bus, no node
        IFS=: read -r model node queues <<<"$nic"
        queues=${queues:-1}
        device=$model
        if [[ $model == virtio ]]; then
            device=virtio-net-pci$dma,disable-legacy=on
            ((queues > 1)) && device+=,mq=on,vectors=$((2 * queues + 2)),hash=on,rss=on
        fi
        device+=,netdev=net$number,romfile=,mac=52:54:00:77:$(printf %02x "$number"):02
        if [[ $node == - ]]; then
            device+=,bus=pcie.0
        elif [[ $model == e1000 ]]; then    # conventional PCI
            if [[ -z ${bridge[$node]:-} ]]; then
                bridge[$node]=1
                q+=(-device "pcie-root-port,id=conv$node,bus=pxb$node,chassis=$chassis,addr=$chassis"
                    -device "pcie-pci-bridge,id=pci$node,bus=conv$node")
                chassis=$((chassis + 1))
            fi
            device+=,bus=pci$node,addr=${bridge[$node]}
            bridge[$node]=$((bridge[$node] + 1))
        else
            q+=(-device "pcie-root-port,id=port$number,bus=pxb$node,chassis=$chassis,addr=$chassis")
            device+=,bus=port$number
            chassis=$((chassis + 1))
        fi
        local tap=(dev "lab$number" mode tap)
        ((queues > 1)) && tap+=(multi_queue)
        if ! { ip tuntap add "${tap[@]}" && ip addr add "10.77.$number.1/24" dev "lab$number" &&
            ip addr add "fd77:$number::1/64" dev "lab$number" nodad && ip link set "lab$number" up; }; then
            fail "cannot make tap lab$number"
        fi
        q+=(-netdev "tap,id=net$number,ifname=lab$number,script=no,downscript=no$( ((queues > 1)) && echo ",queues=$queues")"
            -device "$device")
        number=$((number + 1))
    done
}

# Runs inside the private namespaces (see the end): $1 run|boot, $2 command.
inside() {
    local status printer
    ip link set lo up
    control=$(mktemp -d) || fail "no scratch directory"
    mkdir -p "$LAB_SHARE" || fail "cannot make $LAB_SHARE"
    trap 'rm -rf "$control"' EXIT
    printf 'LAB_CWD=%q\n' "$PWD" >"$control/env"
    arguments "$control"
    if [[ $1 == boot ]]; then
        q+=(-serial mon:stdio)
        qemu-system-x86_64 "${q[@]}"
        return
    fi
    printf '%s\n' "$2" >"$control/cmd"
    q+=(-serial "file:$LAB_SHARE/console.log" -device "virtio-serial-pci,bus=pcie.0"
        -chardev "file,id=out,path=$control/out" -device "virtserialport,chardev=out,name=lab.out")
    mkfifo "$control/out"
    cat "$control/out" & printer=$!
    [[ -n $LAB_PEER ]] && SHARE=$LAB_SHARE bash -c "$LAB_PEER" >"$LAB_SHARE/peer.log" 2>&1 </dev/null &
    timeout -k 5 "$LAB_TIMEOUT" qemu-system-x86_64 "${q[@]}" </dev/null >"$LAB_SHARE/qemu.log" 2>&1
    status=$?
    : <>"$control/out"; wait "$printer"         # end of output, even if QEMU never opened it
    ((status == 124 || status == 137)) && { echo "lab.sh: time limit (${LAB_TIMEOUT} s)" >&2; return 124; }
    if [[ ! -s $control/rc ]]; then
        tail -n 20 "$LAB_SHARE/console.log" "$LAB_SHARE/qemu.log" >&2
        ((status <= 128)) || { echo "lab.sh: the emulator crashed, signal $((status - 128))" >&2; return 126; }
        fail "the guest stopped before the command ended"
    fi
    return "$(<"$control/rc")"
}

case ${1:-} in
    prepare) prepare ;;
    run | boot)
        [[ $1 == boot || $# -eq 2 ]] || fail "usage: $0 run 'COMMAND'"
        need_root
        prepare || exit 125
        export LAB_DIR LAB_SHARE LAB_NICS LAB_MEM LAB_CPUS LAB_DISK LAB_IOMMU LAB_APPEND LAB_TIMEOUT LAB_PEER
        # Own network namespace (taps and addresses vanish with it) and own PID
        # namespace (so does every process of this run, however it ends).
        exec unshare --net --pid --fork --kill-child --mount-proc bash "$script" inside "$@" ;;
    inside) shift; inside "$@" ;;
    *) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
