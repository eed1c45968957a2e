# The verbs of init, also usable from the shell: `. /lib/bedplate/verbs.sh`.
# Each prints lines that begin with BEDPLATE- and end in a result that the trials compare.

load_modules() {
    for module in $(cat /lib/bedplate/modules); do
        insmod "/lib/bedplate/$module.ko" || echo "BEDPLATE-MODULE $module did not load"
    done
}

# pattern WORD KIB: the same bytes everywhere, cheap to make.
pattern() {
    yes "$1" | head -c $(($2 * 1024))
}

# field N LIST: the N-th of a comma-separated list.
field() {
    echo "$2" | cut -d, -f"$1"
}

sum_of() {
    sha256sum "$@" | cut -d' ' -f1
}

# clock_check: time since boot may not go backwards, not even across a restore.
clock_before=0
clock_check() {
    read -r up rest < /proc/uptime
    clock_now=$((${up%.*} * 100 + 1${up#*.} - 100))
    [ "$clock_now" -ge "$clock_before" ] || echo "BEDPLATE-CLOCK backwards from $clock_before to $clock_now"
    clock_before=$clock_now
}

checksum() {
    rounds=$(field 1 "$1")
    pattern bedplate-pool "$(field 2 "$1,256")" > /tmp/pool
    sum=start
    round=0
    while [ "$round" -lt "$rounds" ]; do
        round=$((round + 1))
        sum=$({ echo "$sum"; cat /tmp/pool; } | sum_of)
        clock_check
        echo "BEDPLATE-CHECKSUM $round/$rounds $sum"
    done
    for job in /tmp/busy.*; do
        [ -f "$job" ] && echo "BEDPLATE-BUSY ${job#/tmp/busy.} $(cat "$job")"
    done
    echo "BEDPLATE-CHECKSUM final $sum"
}

# blk_once KIB DEVICE WORD: prints the sum that was read back, or nothing.
blk_once() {
    pattern "$3" "$1" > /tmp/disk.$3
    wanted=$(sum_of /tmp/disk.$3)
    dd if=/tmp/disk.$3 of="$2" bs=64k conv=fsync 2>/dev/null || return 1
    echo 3 > /proc/sys/vm/drop_caches
    got=$(dd if="$2" bs=1024 count="$1" 2>/dev/null | sum_of)
    [ "$got" = "$wanted" ] && echo "$got"
}

blk() {
    device=$(field 2 "$1,/dev/vda")
    if sum=$(blk_once "$(field 1 "$1")" "$device" bedplate-disk); then
        echo "BEDPLATE-BLK ok $sum"
    else
        echo "BEDPLATE-BLK failed on $device"
    fi
}

net_up() {
    ip link set lo up
    ip link set eth0 up || { echo "BEDPLATE-NET failed: no eth0"; return 1; }
    ip -4 addr show dev eth0 | grep -q 'inet ' && return 0
    udhcpc -q -n -t 10 -T 3 -i eth0 -s /lib/bedplate/dhcp.sh > /tmp/dhcp.log 2>&1 \
        || { echo "BEDPLATE-NET failed: no lease"; cat /tmp/dhcp.log; return 1; }
}

# with_gateway URL: the word GATEWAY stands for the default gateway, behind which the host's loopback lies.
with_gateway() {
    echo "$1" | sed "s/GATEWAY/$(ip route | sed -n 's/^default via \([0-9.]*\).*/\1/p')/"
}

# reach ADDRESS PORT: waits until a program there takes a connection.
reach() {
    tries=0
    until nc -w 5 "$1" "$2" < /dev/null > /dev/null 2>&1; do
        tries=$((tries + 1))
        [ "$tries" -lt 300 ] || { echo "BEDPLATE-NET failed: nobody at $1 port $2"; return; }
        sleep 1
    done
    echo "BEDPLATE-NET reached $1 port $2"
}

net() {
    net_up || return
    case "$1" in
        address,*)
            ip addr add "${1#address,}" dev eth0 || echo "BEDPLATE-NET failed: address ${1#address,}"
            ;;
        listen,*)
            if timeout 600 nc -l -p "${1#listen,}" < /dev/null > /dev/null; then
                echo "BEDPLATE-NET called on port ${1#listen,}"
            else
                echo "BEDPLATE-NET failed: nobody called on port ${1#listen,}"
            fi
            ;;
        reach,*) reach "$(field 2 "$1")" "$(field 3 "$1")" ;;
        dhcp) echo "BEDPLATE-NET address $(ip -4 addr show dev eth0 | sed -n 's/.*inet \([0-9.]*\).*/\1/p')" ;;
        fetch,*)
            if wget -q -O /tmp/fetched "$(with_gateway "${1#fetch,}")"; then
                echo "BEDPLATE-NET fetched $(sum_of /tmp/fetched) $(wc -c < /tmp/fetched) bytes"
            else
                echo "BEDPLATE-NET failed: wget ${1#fetch,}"
            fi
            ;;
        serve,*)
            mkdir -p /tmp/www
            pattern bedplate-served "$(field 3 "$1")" > /tmp/www/file
            httpd -p "$(field 2 "$1")" -h /tmp/www
            echo "BEDPLATE-NET serving $(sum_of /tmp/www/file)"
            ;;
        *) echo "BEDPLATE-UNKNOWN net $1" ;;
    esac
}

# Background jobs write one line to /tmp/busy.NAME; a wrong sum stays there for good. A transfer that a restore
# cuts short is repeated and is no error.
busy() {
    case "$1" in
        disk*) busy_disk "$(field 2 "$1,1024")" "$(field 3 "$1,1024,/dev/vda")" & ;;
        net,*) net_up && busy_net "$(with_gateway "${1#net,}")" & ;;
        *) echo "BEDPLATE-UNKNOWN busy $1" ;;
    esac
}

busy_disk() {
    done=0
    while true; do
        if ! sum=$(blk_once "$1" "$2" "round-$((done % 16))"); then
            echo "failed in round $done" > /tmp/busy.disk
            return
        fi
        rm -f /tmp/disk.round-*
        done=$((done + 1))
        echo "ok after $done rounds" > /tmp/busy.disk
    done
}

busy_net() {
    done=0 cut=0 first=
    while true; do
        if wget -q -O /tmp/busy-fetched "$1"; then
            sum=$(sum_of /tmp/busy-fetched)
            [ -n "$first" ] || first=$sum
            if [ "$sum" != "$first" ]; then
                echo "failed: $sum instead of $first" > /tmp/busy.net
                return
            fi
            done=$((done + 1))
        else
            cut=$((cut + 1))
            sleep 1
        fi
        echo "ok after $done rounds, $cut cut short" > /tmp/busy.net
    done
}

# selftests: each test's exit status (4: skipped), with its output if it failed.
selftests() {
    ip link set lo up
    count=0
    for test in /lib/bedplate/selftests/*; do
        [ -x "$test" ] || continue
        name=${test##*/}
        echo "BEDPLATE-SELFTEST begins $name"
        timeout -s KILL 180 "$test" < /dev/null > /tmp/selftest.log 2>&1
        status=$?
        [ "$status" = 0 ] || tail -n 15 /tmp/selftest.log
        echo "BEDPLATE-SELFTEST status $name $status"
        count=$((count + 1))
    done
    echo "BEDPLATE-SELFTEST done $count"
}
