#!/usr/bin/env bash
# A real Slurm on one machine, for tests and for trying things out: one node, partitions debug, low
# (jobs are preempted by those in high) and high. Needs root; installs what is missing on Debian.
# No systemd, no cgroups. Daemons that run already (by pid file) are left alone.
#   SLURM_ROOT   state, logs, pid files                 (default /var/tmp/tcsae-slurm; MariaDB's user
#                must be able to enter it, so not below root's home)
#   ACCT         dbd = mariadb+slurmdbd, sacct works    (default) | none = sacct does not work
#   FAKE_CPUS    CPUs the node claims to have           (default nproc)
#   MAX_ARRAY    MaxArraySize                           (default 10001)
#   FAKE_GPUS    GPUs the node claims to have           (default 2; 0 = none); nothing computes there
# scripts/stop-slurm.sh stops it.
set -euo pipefail
trap 'echo "start-slurm.sh: line $LINENO failed; logs: ${SLURM_ROOT:-/var/tmp/tcsae-slurm}/log" >&2' ERR
ROOT=${SLURM_ROOT:-/var/tmp/tcsae-slurm}
ACCT=${ACCT:-dbd}
CPUS=${FAKE_CPUS:-$(nproc)}
GPUS=${FAKE_GPUS:-2}
HOST=$(hostname -s)
MEM=$(awk '/MemTotal/{print int($2/1024*0.9)}' /proc/meminfo)
DBPORT=${DBPORT:-13306}
[ "$(id -u)" = 0 ] || { echo "must be root" >&2; exit 1; }

pkgs="munge slurmctld slurmd slurm-client"
[ "$ACCT" = dbd ] && pkgs="$pkgs slurmdbd mariadb-server"
missing=$(for p in $pkgs; do dpkg-query -W -f='${Status}' $p 2>/dev/null | grep -q 'install ok installed' || echo $p; done)
if [ -n "$missing" ]; then
  # no systemd here: make sure package scripts do not try to start the services
  [ -e /usr/sbin/policy-rc.d ] || printf '#!/bin/sh\nexit 101\n' | install -m755 /dev/stdin /usr/sbin/policy-rc.d
  apt-get update -q >/dev/null
  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $missing >/dev/null
fi

install -d -m755 "$ROOT" "$ROOT"/{log,run,ctld,spool}
grestypes=""; gresnode=""; : > "$ROOT/gres.conf"
if [ "$GPUS" -gt 0 ]; then
  grestypes="GresTypes=gpu"; gresnode="Gres=gpu:$GPUS"
  install -d "$ROOT/dev"
  for i in $(seq 0 $((GPUS-1))); do
    # /dev/null's twin (char 1:3): a harmless device node; falls back to a plain file
    [ -e "$ROOT/dev/gpu$i" ] || mknod "$ROOT/dev/gpu$i" c 1 3 2>/dev/null || touch "$ROOT/dev/gpu$i"
    echo "NodeName=$HOST Name=gpu File=$ROOT/dev/gpu$i" >> "$ROOT/gres.conf"
  done
fi
if [ "$ACCT" = dbd ]; then
  acct="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=6819
AccountingStorageTRES=gres/gpu"
else
  acct="AccountingStorageType=accounting_storage/none"
fi
cat > "$ROOT/slurm.conf.new" <<CONF
ClusterName=tcsae
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# how long a requeued job waits before it may start again (default 120 s)
AuthInfo=cred_expire=5
SlurmctldPort=6817
SlurmdPort=6818
SlurmctldPidFile=$ROOT/run/slurmctld.pid
SlurmdPidFile=$ROOT/run/slurmd.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd.log
SlurmctldDebug=info
SlurmdDebug=info
StateSaveLocation=$ROOT/ctld
SlurmdSpoolDir=$ROOT/spool
# no cgroups, no CPU binding
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=10
MpiDefault=none
SwitchType=switch/none
# scheduling
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5,sched_min_interval=0,preempt_send_user_signal
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=256
MaxArraySize=${MAX_ARRAY:-10001}
ReturnToService=2
SlurmdParameters=config_overrides
# requeue / timeout / preemption
JobRequeue=1
KillWait=5
OverTimeLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
RebootProgram=/bin/true
$grestypes
$acct
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=$CPUS RealMemory=$MEM $gresnode State=UNKNOWN
PartitionName=debug Nodes=$HOST Default=YES MaxTime=INFINITE PriorityTier=10 State=UP
PartitionName=high  Nodes=$HOST MaxTime=INFINITE PriorityTier=20 PreemptMode=OFF State=UP
PartitionName=low   Nodes=$HOST MaxTime=INFINITE PriorityTier=1 GraceTime=20 PreemptMode=REQUEUE State=UP
CONF
cmp -s "$ROOT/slurm.conf.new" "$ROOT/slurm.conf" 2>/dev/null && changed=0 || changed=1
mv "$ROOT/slurm.conf.new" "$ROOT/slurm.conf"
ln -sfn "$ROOT/slurm.conf" /etc/slurm/slurm.conf
ln -sfn "$ROOT/gres.conf"  /etc/slurm/gres.conf

alive() { # pidfile comm
  local p; p=$(cat "$1" 2>/dev/null) && [ -n "$p" ] && [ "$(cat /proc/$p/comm 2>/dev/null)" = "$2" ]
}
waitfor() { local n=$1; shift; for _ in $(seq $((n*5))); do "$@" >/dev/null 2>&1 && return 0; sleep .2; done; echo "timeout: $*" >&2; return 1; }

# --- munge
install -d -m755 -o munge -g munge /run/munge
[ -s /etc/munge/munge.key ] || runuser -u munge -- /usr/sbin/mungekey -c
if ! alive /run/munge/munged.pid munged; then
  runuser -u munge -- /usr/sbin/munged --pid-file=/run/munge/munged.pid
fi
waitfor 10 sh -c 'munge -n | unmunge'

# --- accounting (needed by sacct)
if [ "$ACCT" = dbd ]; then
  install -d -m755 -o mysql -g mysql "$ROOT/mysql"
  [ -d "$ROOT/mysql/mysql" ] || mariadb-install-db --no-defaults --user=mysql --datadir="$ROOT/mysql" \
      --auth-root-authentication-method=normal --skip-test-db >"$ROOT/log/mariadb-install.log" 2>&1
  SOCK=$ROOT/mysql/mysqld.sock
  if ! alive "$ROOT/mysql/mariadbd.pid" mariadbd; then
    setsid nohup mariadbd --no-defaults --user=mysql --datadir="$ROOT/mysql" --socket="$SOCK" \
      --bind-address=127.0.0.1 --port=$DBPORT --pid-file="$ROOT/mysql/mariadbd.pid" \
      --innodb-buffer-pool-size=128M --innodb-lock-wait-timeout=900 \
      >"$ROOT/log/mariadbd.log" 2>&1 </dev/null &
  fi
  waitfor 30 mariadb-admin --no-defaults --socket="$SOCK" -uroot ping
  mariadb --no-defaults --socket="$SOCK" -uroot -e "CREATE DATABASE IF NOT EXISTS slurm_acct_db;
    CREATE USER IF NOT EXISTS 'slurm'@'localhost' IDENTIFIED BY 'slurm';
    CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
    GRANT ALL ON slurm_acct_db.* TO 'slurm'@'localhost'; GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';"
  cat > "$ROOT/slurmdbd.conf" <<CONF
AuthType=auth/munge
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=6819
SlurmUser=root
DebugLevel=info
LogFile=$ROOT/log/slurmdbd.log
PidFile=$ROOT/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$DBPORT
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CONF
  chown root:root "$ROOT/slurmdbd.conf"; chmod 600 "$ROOT/slurmdbd.conf"
  ln -sfn "$ROOT/slurmdbd.conf" /etc/slurm/slurmdbd.conf
  alive "$ROOT/run/slurmdbd.pid" slurmdbd || slurmdbd
  waitfor 30 sacctmgr -n list cluster
  sacctmgr -n list cluster format=cluster%30 | grep -qw tcsae || sacctmgr -i add cluster tcsae >/dev/null
fi

# --- controller and node daemon
alive "$ROOT/run/slurmctld.pid" slurmctld || { slurmctld; changed=0; }
waitfor 30 scontrol ping
alive "$ROOT/run/slurmd.pid" slurmd || slurmd -N "$HOST"
[ "$changed" = 0 ] || scontrol reconfigure || true
# a node left DOWN/DRAIN by an earlier crash comes back
waitfor 10 scontrol show node "$HOST"
scontrol show node "$HOST" | grep -Eq 'State=[A-Z+*]*(DOWN|DRAIN)' && scontrol update NodeName="$HOST" State=RESUME || true
waitfor 30 sh -c "sinfo -h -p debug -o %t | grep -Eq '^(idle|mix|alloc)$'"
sinfo
