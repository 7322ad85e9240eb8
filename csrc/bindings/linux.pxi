# linux
